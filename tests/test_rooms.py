"""The rooms of the code: who may know whom, and what a changed line makes run again."""

import ast
from pathlib import Path

import pytest
import yaml
from project import ROOT, add_example, copy

from common.core import loading
from common.settings import DatasetSettings
from common.stage import papers as every
from common.stage.papers import load, papers
from common.stage.resolve import resolved
from common.stage.scheduler import in_order
from common.stage.store import Store, code_files
from replications.equal_footing import protocol as equal_footing

GROUND = {Path("common/reading.py"), Path("common/settings.py"), Path("common/records.py")}
"""What every room stands on, and what a run takes from it is in the run's identity or in its record."""
JUDGING = {file.relative_to(ROOT) for file in (ROOT / "common/statistics").rglob("*.py")}
"""It says what a stage's further looks need, and changes no number of a run."""
METHODS = [paper for paper in papers() if paper != equal_footing.NAME]
ENTERING = [Path(folder).name for folder in equal_footing.code()]
"""A paper need not enter the comparison on equal footing."""


def _imports(file):
    """The names that a file imports, those within functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _reached(file):
    """The project's own files that are read when a file is imported, itself included; empty ones left out."""
    reached, waiting = set(), {ROOT / file}
    while waiting:
        found = waiting.pop()
        reached.add(found)
        for name in _imports(found):
            path = ROOT / name.replace(".", "/")
            files = {path.with_suffix(".py"), path / "__init__.py"}
            waiting |= {file for file in files if file.exists() and file.stat().st_size} - reached
    return {path.relative_to(ROOT) for path in reached}


@pytest.mark.parametrize(
    ("room", "known"),
    [
        ("reading.py", ()),
        ("settings.py", ("reading",)),
        ("profiles.py", ("reading", "settings")),
        ("naming.py", ()),
        ("records.py", ("reading", "settings")),
        ("predictions.py", ("reading", "records", "settings")),
        ("core", ("records", "settings")),
        ("arena.py", ("core", "settings")),
        (
            "stage",
            (
                "commandline",
                "core",
                "naming",
                "predictions",
                "profiles",
                "reading",
                "records",
                "settings",
                "statistics",
            ),
        ),
        ("commandline.py", ()),
        ("statistics", ("commandline", "predictions", "profiles", "reading", "records", "settings")),
        ("report", ("commandline", "naming", "predictions", "reading", "records", "settings", "statistics")),
    ],
)
def test_a_room_knows_only_what_it_stands_on(room, known):
    place = ROOT / "common" / room
    found = {name for file in (place.rglob("*.py") if place.is_dir() else [place]) for name in _imports(file)}
    rooms = {name.split(".")[1] for name in found if name.startswith("common.")}
    assert rooms - {place.stem} <= set(known)
    assert not {name for name in found if name.split(".")[0] == "replications"}
    if room == "core":
        assert not {"mlflow", "dvc", "importlib"} & {name.split(".")[0] for name in found}


# ---------------------------------------------------------------------------------------- the code of a run


@pytest.mark.parametrize("paper", papers())
def test_a_run_reaches_no_code_but_that_of_its_digest(paper):
    more = (equal_footing.ARENA,) if paper == equal_footing.NAME else ()
    code, reached = set(code_files(paper, more)), _reached(f"replications/{paper}/protocol.py")
    assert reached - code == GROUND
    # and every file of the paper plays a part in its runs
    assert {file for file in code if file.is_relative_to("replications")} <= reached


@pytest.mark.parametrize("paper", [paper for paper in ENTERING if paper in METHODS])
def test_an_entry_on_equal_footing_reaches_no_code_but_that_of_its_digest(paper):
    code = code_files(equal_footing.NAME, (equal_footing.ARENA, f"replications/{paper}"))
    assert _reached(f"replications/{paper}/contender.py") - set(code) == GROUND


@pytest.fixture(scope="module")
def runs():
    """Each paper's runs of the first seed in profile `digits`, and what they need; other images stand in for glyphs."""
    found, digits = {}, loading.load(DatasetSettings(train=600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", lambda settings: digits)
        for paper in papers():
            profile = load(paper, ROOT / "params.yaml", "digits")
            seed = profile.paper.seeds[0]
            listed = every.runs(paper, profile)
            found[paper] = in_order([run for run in listed if run.seed == seed])
    return found


def _of_stage(stage, project=ROOT):
    """The code that a stage depends on, by file; empty files left out."""
    deps = yaml.safe_load((project / "dvc.yaml").read_text())["stages"][stage]["deps"]
    places = [project / dep for dep in deps if dep.startswith(("common", "replications"))]
    files = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
    code = [file for file in files if file.suffix == ".py" and file.stat().st_size]
    return sorted(file.relative_to(project) for file in code)


@pytest.fixture(scope="module")
def settings():
    """What the stage `settings` writes, by stage: on it each stage depends, too."""
    return resolved(ROOT / "params.yaml", "digits")


@pytest.mark.parametrize("paper", papers())
def test_a_stage_depends_on_the_code_of_its_runs(runs, settings, paper):
    codes = {run.code for run in runs[paper]}
    entering = {Path(file) for file in settings[paper].get("code", ())}
    assert bool(entering) == (paper == equal_footing.NAME)
    depends = entering.union(_of_stage(paper)) - JUDGING
    assert depends == {file for code in codes for file in code_files(paper, code)}


def test_the_stage_of_the_example_depends_on_the_code_of_its_runs(tmp_path):
    project = copy(tmp_path)
    add_example(project)
    assert set(_of_stage("example", project)) - JUDGING == set(code_files("example", root=project))


@pytest.mark.parametrize("stage", ["statistics", "report"])
def test_a_stage_that_trains_nothing_depends_on_the_code_that_it_reaches(stage):
    assert _reached(f"common/{stage}/__main__.py") <= set(_of_stage(stage))


# ---------------------------------------------------------------------------------------- what a changed line changes


@pytest.fixture(scope="module")
def keys(runs, tmp_path_factory):
    """A function of files: the runs whose key is another one when each of the files has one more line."""
    folder = tmp_path_factory.mktemp("keys")
    every = [run for listed in runs.values() for run in listed]

    def named(project):
        store = Store(folder, root=project)
        return {(*run.identity.values(), run.settings_hash): store.key(run) for run in every}

    def changed(*files):
        project = copy(tmp_path_factory.mktemp("changed"))
        for file in files:
            with (project / file).open("a") as content:
                content.write("\n# one more line\n")
        after = named(project)
        return {run for run, key in before.items() if after[run] != key}

    with pytest.MonkeyPatch.context() as patch:
        # the corpus may not be there; data does not depend on code
        patch.setattr("common.stage.store.data_prints", lambda run: [])
        before = named(ROOT)
        assert len(set(before.values())) == len(before) == len(every)
        yield changed


def _files(folder):
    return [file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.py")]


def _identities(runs, chosen):
    return {(*run.identity.values(), run.settings_hash) for run in runs if chosen(run)}


def _entered(paper, run):
    """Whether a run is of the paper's entry to equal footing: a trial, what was chosen, or interpolated from it."""
    found = equal_footing.contenders().items()
    names = [name for name, (folder, _) in found if folder == f"replications/{paper}"]
    job = run.job.points[0] if isinstance(run.job, equal_footing.AtMacs) else run.job
    return run.paper == equal_footing.NAME and getattr(job, "method", None) in names


@pytest.mark.parametrize(
    "files",
    [
        _files("common/stage"),
        _files("common/statistics"),
        _files("common/report"),
        _files("replications/pretraining_impact/glyphs"),
        [
            "common/naming.py",
            "common/profiles.py",
            "common/settings.py",
            "common/records.py",
            "common/predictions.py",
            "params.yaml",
            "dvc.yaml",
            "pyproject.toml",
            "replications/commands.py",
        ],
        [f"replications/{paper}/{name}" for paper in papers() for name in ("README.md", "claims.yaml")],
    ],
    ids=["stage", "statistics", "report", "glyphs", "settings and records", "readme and claims"],
)
def test_what_determines_no_number_changes_no_key(keys, files):
    assert files and keys(*files) == set()


@pytest.mark.parametrize("file", _files("common/core"), ids=str)
def test_the_core_changes_every_key(keys, runs, file):
    if (ROOT / file).stat().st_size:
        assert keys(file) == _identities(sum(runs.values(), []), lambda run: True)


@pytest.mark.parametrize("paper", METHODS)
def test_an_algorithm_changes_the_keys_of_its_paper_and_of_its_entry(keys, runs, paper):
    own = lambda run: run.paper == paper or _entered(paper, run)  # noqa: E731
    for name in ("method.py", "protocol.py"):
        assert keys(f"replications/{paper}/{name}") == _identities(sum(runs.values(), []), own)


@pytest.mark.parametrize("paper", ENTERING)
def test_a_contender_changes_the_keys_of_its_entry_alone(keys, runs, paper):
    entry = _identities(runs[equal_footing.NAME], lambda run: _entered(paper, run))
    assert entry and keys(f"replications/{paper}/contender.py") == entry


@pytest.mark.parametrize("file", ["common/arena.py", "replications/equal_footing/protocol.py"])
def test_the_arena_changes_the_keys_of_equal_footing_alone(keys, runs, file):
    assert keys(file) == _identities(runs[equal_footing.NAME], lambda run: True)
