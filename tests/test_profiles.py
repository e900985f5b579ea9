"""Profiles that extend one another, and the files by which the real DVC sees whose settings an edit changes."""

import json

import pytest
import yaml
from project import ROOT, copy, run

from common.profiles import profile_chain
from common.reading import read_yaml
from common.settings import PaperSettings, SettingsError, merged, validated
from common.stage.papers import load, papers
from common.stage.resolve import main, resolved, write
from replications.pruning_from_scratch import protocol as pruning_from_scratch


def _params(folder, **profiles):
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump({"profile": next(iter(profiles)), "profiles": profiles}, sort_keys=False))
    return file


# ------------------------------------------------------------------------------------------ what is inherited


def test_tables_merge_key_by_key_and_all_else_replaces():
    base = {"a": {"b": 1, "c": {"d": [1, 2], "e": 2}}, "f": [1, 2], "g": {"h": 1}, "i": 3}
    changes = {"a": {"c": {"d": [3]}}, "f": [], "g": None, "j": {"k": 1}}
    found = merged(base, changes)
    assert found == {"a": {"b": 1, "c": {"d": [3], "e": 2}}, "f": [], "g": None, "i": 3, "j": {"k": 1}}
    assert base["a"]["c"] == {"d": [1, 2], "e": 2}  # as it was
    assert merged([1], {"a": 1}) == {"a": 1} and merged({"a": 1}, [1]) == [1]


def test_a_profile_says_only_what_differs(tmp_path):
    file = _params(
        tmp_path,
        c={"extends": "b", "halo": {"training": {"batch_size": 9}, "seeds": [5]}},
        b={"extends": "a", "execution": {"threads": 2}, "halo": {"training": {"epochs": 7}}},
        a={
            "dataset": {"source": "digits", "train": 300},
            "execution": {"precision": "bfloat16"},
            "halo": {
                "training": {"epochs": 5, "milestones": [0.4], "batch_size": 3},
                "fine_tuning_epochs": 2,
            },
        },
    )
    assert [name for name, _ in profile_chain(file, "c")] == ["a", "b", "c"]
    profile = load("halo", file)
    assert profile.name == "c" and profile.dataset.train == 300
    assert (profile.execution.threads, profile.execution.precision) == (2, "bfloat16")
    assert (profile.paper.fine_tuning_epochs, profile.paper.seeds) == (2, (5,))
    training = profile.paper.training
    assert (training.epochs, training.milestones, training.batch_size) == (7, (0.4,), 9)
    assert training.learning_rate == 0.1  # nobody says another one than the paper's
    # nobody's profile has changed by being extended
    assert (
        load("halo", file, "a").paper.training.epochs == 5 and load("halo", file, "b").execution.threads == 2
    )


def test_null_replaces_what_is_inherited(tmp_path):
    file = _params(
        tmp_path,
        child={
            "extends": "parent",
            "dataset": {"train": None},
            "halo": None,
            "pretraining_impact": {"corpus": None, "checkpoint": {"source": "weights.pt"}},
        },
        parent={
            "dataset": {"train": 300},
            "halo": {"training": {"epochs": 15}},
            "pretraining_impact": {"corpus": {"source": "digits"}},
        },
        same={"extends": "parent", "halo": {}},
    )
    assert load("halo", file).dataset.train is None
    assert load("halo", file).paper == load("halo", _params(tmp_path, empty={})).paper
    file = _params(
        tmp_path, same={"extends": "parent", "halo": {}}, parent={"halo": {"training": {"epochs": 15}}}
    )
    assert load("halo", file).paper.training.epochs == 15


def test_null_takes_a_key_out_of_a_table_of_ones_own_keys(tmp_path):
    file = _params(
        tmp_path,
        child={
            "extends": "parent",
            "pruning_from_scratch": {"variants": {"pfs-b": None, "uniform-e": [0.7]}},
        },
        parent={"pruning_from_scratch": {"variants": {"pfs-e": [0.5], "pfs-b": [0.5], "uniform-e": [0.5]}}},
    )
    assert load("pruning_from_scratch", file).paper.variants == {"pfs-e": (0.5,), "uniform-e": (0.7,)}
    # not where null is a value, and not for a setting that must have one
    assert load(
        "halo",
        _params(tmp_path, only={"halo": {"cells": [{"architecture": "mlp", "settings": {"a": None}}]}}),
    ).paper.cells[0].settings == {"a": None}
    with pytest.raises(SettingsError, match=r"x\.seeds"):
        validated(pruning_from_scratch.Settings, {"seeds": None}, "x")


@pytest.mark.slow
def test_every_profile_of_the_project_can_be_used():
    for name in read_yaml(ROOT / "params.yaml")["profiles"]:
        for paper in papers():
            assert load(paper, ROOT / "params.yaml", name).name == name


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (
            {"a": {"extends": "digit"}, "digits": {}},
            "profiles.a.extends = 'digit': unknown profile; allowed: digits (did you mean 'digits'?)",
        ),
        (
            {"a": {"extends": "b"}, "b": {"extends": "c"}, "c": {"extends": "b"}, "d": {}},
            "profiles.c.extends = 'b': a profile must not extend itself (b -> c -> b); allowed: d",
        ),
        (
            {"a": {"extends": "a"}},
            "profiles.a.extends = 'a': a profile must not extend itself (a -> a); allowed: none",
        ),
        ({"a": {"extends": ["b"]}, "b": {}}, "profiles.a.extends = ['b']: unknown profile; allowed: b"),
        ({"a": {"extends": None}, "b": {}}, "profiles.a.extends = None: unknown profile; allowed: b"),
        ({"a": {"extends": "b"}, "b": [1]}, "profiles.b = [1]: must be a table"),
        ({"a": {}, "..": {}}, "profiles: '..': a name must be letters, digits"),
        ({"a": {}, "/b": {}}, "profiles: '/b': a name must be letters, digits"),
        ({"a": {"extend": "b"}, "b": {}}, "profiles.a.extend: unknown key; allowed: extends, dataset"),
    ],
)
def test_a_wrong_parent_is_one_line_that_says_what_is_allowed(tmp_path, capsys, profiles, message):
    file = _params(tmp_path, **profiles)
    with pytest.raises(SettingsError) as error:
        load("halo", file)
    assert str(error.value).startswith(f"{file}: {message}") and "\n" not in str(error.value)
    assert main(["--params", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: {message}")


def test_a_number_is_no_name_of_a_profile(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("profile: a\nprofiles:\n  a: {extends: 1}\n  1: {}\n")
    with pytest.raises(
        SettingsError, match="profiles: 1: a name must be letters, .* \\(numbers in quotes\\)"
    ):
        load("halo", file)


def test_a_wrong_setting_is_named_where_it_is_written(tmp_path):
    file = _params(
        tmp_path, a={"extends": "b"}, b={"extends": "c", "halo": {"training": {"epochs": -1}}}, c={"halo": {}}
    )
    with pytest.raises(SettingsError, match=r"params\.yaml: profiles\.b\.halo\.training\.epochs = -1"):
        load("halo", file)
    file = _params(tmp_path, a={"extends": "b", "halo": {"training": {"epochs": -1}}}, b={"halo": {}})
    with pytest.raises(SettingsError, match=r"params\.yaml: profiles\.a\.halo\.training\.epochs = -1"):
        load("halo", file)


# ------------------------------------------------------------------------------------------ what a stage sees


def test_a_file_changes_with_what_its_stage_reads_and_with_nothing_else(tmp_path):
    base = {
        "dataset": {"source": "digits", "train": 200},
        "halo": {"training": {"epochs": 12}},
        "pretraining_impact": {"corpus": {"source": "mnist", "validation": 50}},
    }
    before = resolved(_params(tmp_path, child={"extends": "base"}, base=base))
    assert set(before) == {"data", "statistics", *papers()}

    def changed(**changes):
        after = resolved(_params(tmp_path, child={"extends": "base"}, base=merged(base, changes)))
        return {stage for stage in before if after[stage] != before[stage]}

    assert changed(halo={"training": {"epochs": 13}}) == {"halo"}
    assert changed(imp_slr={"seeds": [0]}) == {"imp_slr"}
    assert changed(execution={"precision": "bfloat16"}) == set(papers())
    assert changed(execution={"workers": 3}) == set()  # by which no record can change
    assert changed(dataset={"augmentation": {"flip": True}}) == set(papers())  # what is prepared stays
    assert changed(dataset={"train": 100}) == {"data", *papers()}
    assert changed(pretraining_impact={"corpus": {"validation": 60}}) == {"data", "pretraining_impact"}
    more = {"first": 100, "count": 16, "looks": [8, 16]}
    assert changed(seeds=more) == {"statistics", *papers()}
    assert changed(seeds={**more, "count": 8}) == set(papers())  # judged at one look, as before


def test_a_changed_default_of_shared_settings_shows(tmp_path, monkeypatch):
    file = _params(tmp_path, only={"dataset": {"source": "digits"}})
    before = resolved(file)
    monkeypatch.setattr(PaperSettings.model_fields["seeds"], "default", (0, 1))
    PaperSettings.model_rebuild(force=True)
    try:
        after = resolved(file)
    finally:
        monkeypatch.undo()
        PaperSettings.model_rebuild(force=True)
    assert {stage for stage in before if after[stage] != before[stage]} == set(papers())


def test_the_files_of_papers_that_are_gone_go_too(tmp_path):
    (tmp_path / "out/only").mkdir(parents=True)
    (tmp_path / "out/only/gone.json").write_text("{}")
    write(_params(tmp_path, only={"halo": {"training": {"epochs": 13}}}), folder=tmp_path / "out")
    assert {file.stem for file in (tmp_path / "out/only").iterdir()} == {"data", "statistics", *papers()}
    halo = json.loads((tmp_path / "out/only/halo.json").read_text())
    assert halo["profile"] == "only" and halo["halo"] == {"training": {"epochs": 13}}


def test_every_stage_of_a_paper_depends_on_its_own_file():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages["settings"]["outs"] == [".settings/${profile}"]
    for stage in ("data", *papers()):
        read = [dep for dep in stages[stage]["deps"] if dep.startswith((".settings", "params"))]
        assert read == [f".settings/${{profile}}/{stage}.json"] and "params" not in stages[stage]


# ------------------------------------------------------------------------------------------ the real DVC

SMALL = """\
profile: small
profiles:
  small:
    extends: base
    imp_slr: {seeds: [0]}
  base:
    dataset: {source: digits, train: 200, validation: 100}
    execution: {workers: 2, threads: 1}
    halo: {training: {epochs: 13}}
"""


@pytest.fixture
def project(tmp_path):
    """A copy with the pipeline's own stages, of which all but `settings` only touch what they should make."""
    project = copy(tmp_path)
    (project / "params.yaml").write_text(SMALL)
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())
    del pipeline["plots"]
    for name, stage in pipeline["stages"].items():
        if name != "settings":
            paths = [
                out if isinstance(out, str) else next(iter(out))
                for out in stage.get("outs", []) + stage.get("metrics", [])
            ]
            folders = {path if "." not in path else path.rpartition("/")[0] for path in paths}
            files = [path if "." in path else f"{path}/made" for path in paths]
            make = f"mkdir -p {' '.join(sorted(folders))} && touch {' '.join(files)}"
            stage["cmd"] = make if paths else "true"  # publishing leaves nothing here
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    person = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*person, "commit", "-qm", "start"]):
        assert run(project, "git", *command).returncode == 0
    return project


def _ran(project, *command):
    """The stages that DVC ran, or took from its cache."""
    result = run(project, "dvc", *command, GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@example.org")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    return {line.split("'")[1] for line in lines if line.startswith("Running stage") or "is cached" in line}


def _edit(project, old, new):
    file = project / "params.yaml"
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.slow
def test_an_edit_runs_the_stages_whose_settings_it_changes(project):
    everything = set(yaml.safe_load((project / "dvc.yaml").read_text())["stages"])
    trained = set(papers())
    assert _ran(project, "repro") == everything
    assert _ran(project, "repro") == set()
    _edit(
        project, "halo: {training: {epochs: 13", "halo: {training: {epochs: 14"
    )  # of the profile that is extended
    assert _ran(project, "repro") == {"settings", "halo"}
    _edit(project, "extends: base", "extends: base\n    halo: {training: {epochs: 14}}  # the same")
    _edit(project, "workers: 2", "workers: 1")
    assert _ran(project, "repro") == {"settings"}
    _edit(project, "threads: 1", "threads: 2")
    assert _ran(project, "repro") == {"settings"} | trained
    _edit(project, "train: 200", "train: 150")
    assert _ran(project, "repro", "halo") == {"settings", "data", "halo"}


@pytest.mark.slow
def test_an_experiment_selects_a_profile_and_changes_settings(project):
    _ran(project, "repro")
    assert {"settings", "halo", "report"} <= _ran(project, "exp", "run", "-S", "profile=base")
    assert (project / ".settings/base/halo.json").exists()
    assert _ran(project, "exp", "run", "-S", "profiles.base.halo.training.epochs=15") == {"settings", "halo"}
    assert json.loads((project / ".settings/base/halo.json").read_text())["halo"]["training"]["epochs"] == 15


@pytest.mark.slow
def test_a_wrong_parent_stops_the_pipeline_before_anything_else_runs(project):
    _edit(project, "extends: base", "extends: bass")
    result = run(project, "dvc", "repro")
    assert result.returncode != 0 and not (project / "results").exists()
    assert "error: params.yaml: profiles.small.extends = 'bass': unknown profile" in result.stderr
