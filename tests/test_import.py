"""Results of another machine: checked whole, put in place whole, and then as if the runs had happened here."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from project import BARE, only_example, params, replications, run

import replications as package
from common.predictions import Predictions, packed, unpacked
from common.stage import importing
from common.stage.store import StageError

pytestmark = pytest.mark.slow

FILES = (
    "digits/example.jsonl",
    "digits/example.curves.jsonl",
    "environment/digits/example.json",
    "digits/example.predictions.npz",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a stage leaves on the other machine."""
    project = only_example(tmp_path_factory.mktemp("there"))
    result = replications(project, "run", "example")
    assert result.returncode == 0, result.stderr
    beside = project / "results" / FILES[2]
    environment = json.loads(beside.read_text())
    environment["machine"]["device"] = "a machine elsewhere"
    beside.write_text(json.dumps(environment))
    return project / "results"


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it, which a test may spoil."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def project(tmp_path):
    return only_example(tmp_path)


@pytest.fixture
def inside(project, monkeypatch):
    """This process works in the copy, where the stage has run before: nothing of that may change."""
    for place in ("common.stage.papers.ROOT", "common.stage.store.ROOT"):
        monkeypatch.setattr(place, project)
    monkeypatch.setattr(package, "__path__", [str(project / "replications")])
    monkeypatch.chdir(project)
    for name in FILES:
        (project / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "results" / name).write_text("as it was")
    yield project
    assert [(project / "results" / name).read_text() for name in FILES] == ["as it was"] * 4


def _refused(folder, **more):
    with pytest.raises(StageError) as refused:
        importing.take_in(folder, Path("results"), **more)
    message = str(refused.value)
    assert "\n" not in message
    return message


def _change(folder, change, sign=True, file=FILES[0], line=0):
    """Change one line of a file and, unless damage is meant, its SHA-256 in the environment."""
    lines = (folder / file).read_text().splitlines()
    content = json.loads(lines[line])
    change(content)
    lines[line] = json.dumps(content, sort_keys=True, separators=(",", ":"))
    _write(folder, lines, sign, file)


def _write(folder, lines, sign=True, file=FILES[0]):
    (folder / file).write_text("".join(line + "\n" for line in lines))
    if sign:
        _sign(folder, file)


def _sign(folder, file):
    environment = json.loads((folder / FILES[2]).read_text())
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    environment["sha256"][Path(file).name] = digest
    (folder / FILES[2]).write_text(json.dumps(environment))


# ------------------------------------------------------------------------------------------ what is refused


def test_other_settings_are_named_with_the_run(inside, folder):
    params(inside, example={"training": {"epochs": 3}})
    message = _refused(folder)
    assert "example/dense mlp target 0 seed 0: settings.training.epochs = 2, here 3" in message
    assert message.endswith("; and 1 more")


def test_runs_that_are_not_planned_and_runs_that_are_missing_are_named(inside, folder):
    params(inside, example={"seeds": [0, 1, 7]})
    message = _refused(folder)
    assert "example/dense mlp target 0 seed 2 is given twice or not listed here" in message
    assert "example/pruned mlp target 0.9 seed 7 is missing" in message


def test_a_run_that_is_given_twice_is_named(inside, folder):
    for file in FILES[:2]:
        lines = (folder / file).read_text().splitlines()
        _write(folder, [*lines, lines[0]], file=file)
    assert "example/dense mlp target 0 seed 0 is given twice" in _refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["settings"].update(extra=1), "seed 0: settings.extra = 1, here absent"),
        (lambda r: r.update(data=["0" * 64]), "seed 0: data = 000000000000, but the data prepared here is"),
        (lambda r: r.pop("cost"), "example.jsonl, line 1: cost is missing"),
        (
            lambda r: r.update(status="done"),
            "example.jsonl, line 1.status = 'done': should be 'ok' or 'failed'",
        ),
        (lambda r: r.update(status="failed"), "seed 0: it failed without a reason"),
        (lambda r: r.update(failure="died"), "seed 0: failure = 'died', but it has not failed"),
        (
            lambda r: r.update(status="failed", reason="r", failure="needs"),
            "seed 0: a failure of kind 'needs', and no other, has a cause",
        ),
        (lambda r: r.update(chance=2), "example.jsonl, line 1.chance = 2: should be less than or equal to 1"),
        (
            lambda r: r["metrics"].update(test_accuracy=93.1),
            "line 1.metrics: test_accuracy = 93.1: must be a num",
        ),
        (lambda r: r["metrics"].update(test_accuracy=True), "line 1.metrics: test_accuracy = True: must be"),
        (lambda r: r["metrics"].update(test_loss=10**400), "line 1.metrics: test_loss = 1000000000"),
        (
            lambda r: r["metrics"].update(test_loss=float("nan")),
            "line 1: not valid JSON (half written?): NaN is",
        ),
        (lambda r: r["metrics"].pop("test_accuracy"), "seed 0: it has finished without a test_accuracy"),
        (lambda r: r["metrics"].update(near=1e300), "seed 0: near = 1e+300: must be at most 1e+100"),
        (lambda r: r.update(reason={"a": 1}), "example.jsonl, line 1.reason: should be a valid string"),
    ],
)
def test_a_record_that_is_not_that_of_the_planned_run_is_named(inside, folder, change, message):
    _change(folder, change)
    assert message in _refused(folder)


def test_a_hash_that_is_not_that_of_the_settings_is_named(inside, folder):
    for file in FILES[:2]:
        _change(folder, lambda content: content.update(settings_hash="f" * 64), file=file)
    _change(folder, lambda content: content["seconds"].update({"f" * 64: 1.0}), file=FILES[2], sign=False)
    assert "example/dense mlp target 0 seed 0: settings_hash is not that of its" in _refused(folder)


@pytest.mark.parametrize("file", [*FILES[:2], FILES[3]])
def test_one_changed_byte_is_noticed(inside, folder, file):
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    message = _refused(folder)
    assert message.startswith(f"{folder / file}: damaged or changed") and FILES[2] in message


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(inside, folder, file):
    (folder / file).unlink()
    assert _refused(folder).startswith(f"{folder / file}: cannot be read: No such file")


def test_curves_of_other_runs_are_refused(inside, folder):
    lines = (folder / FILES[1]).read_text().splitlines()
    _write(folder, lines[1:], file=FILES[1])
    assert "example.curves.jsonl: not the curves of the runs in example.jsonl" in _refused(folder)


def test_predictions_of_other_runs_are_refused(inside, folder):
    found = unpacked((folder / FILES[3]).read_bytes(), folder / FILES[3])
    digests = [json.loads(line)["predictions"] for line in (folder / FILES[0]).read_text().splitlines()]
    _pack(folder, [found[digest] for digest in digests[:2] + digests[3:]])
    assert (
        "example.predictions.npz: the predictions of dense, digits, mlp, target 0, seed 1 are missing"
        in _refused(folder)
    )
    _pack(folder, [Predictions.of(one.labels, one.labels) for one in found.values()])
    assert "target 0, seed 0 are missing or changed" in _refused(folder)
    _pack(folder, found.values())
    _change(folder, lambda r: r["metrics"].update(test_accuracy=0.5))
    assert "seed 0 predicts with an accuracy of 0." in (message := _refused(folder))
    assert message.endswith(", but its record says 0.5")
    (folder / FILES[3]).write_bytes(b"no archive")
    _sign(folder, FILES[3])
    assert "example.predictions.npz: no readable predictions, or damaged" in _refused(folder)


def _pack(folder, predictions):
    (folder / FILES[3]).write_bytes(packed(predictions))
    _sign(folder, FILES[3])


def test_another_version_of_the_code_is_refused(inside, folder):
    training = inside / "common" / "core" / "trainer.py"
    training.write_text(training.read_text() + "\n# changed\n")
    assert "example.json: made by other code (digest " in _refused(folder)


def test_a_folder_without_results_is_refused(inside, folder, tmp_path):
    assert "not a results folder" in _refused(tmp_path / "nowhere")
    assert "not a results folder" in _refused(folder / "digits")


def test_another_profile_is_refused_with_the_one_to_select(inside, folder):
    params(inside, "small")
    assert _refused(folder).endswith(
        "results of profile digits, but params.yaml selects small; select it with `profile: digits`"
    )


def test_an_unknown_paper_is_refused(inside, folder):
    assert "nothing of paper 'exmple'; allowed: example (did you mean" in _refused(folder, only=["exmple"])
    shutil.copy(folder / FILES[0], folder / "digits" / "sixth.jsonl")
    assert "unknown paper 'sixth'; allowed: example" in _refused(folder)


def test_a_full_disk_changes_nothing(inside, folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert _refused(folder) == "results: No space left on device; nothing was imported"
    assert sorted(path.name for path in (inside / "results").iterdir()) == ["digits", "environment"]


def test_what_stands_beside_the_records_is_checked_as_they_are(inside, folder):
    kept = {name: (folder / name).read_bytes() for name in FILES}
    name = json.loads(kept[FILES[0]].splitlines()[0])["settings_hash"]
    for file, change, message in (
        (
            FILES[1],
            lambda c: c.update(curves=[1, "x"]),
            "curves.jsonl, line 1.curves[0] = 1: should be a valid d",
        ),
        (
            FILES[1],
            lambda c: c["curves"][0].update(lr={}),
            "curves.jsonl, line 1.curves[0].lr: should be a valid",
        ),
        (
            FILES[2],
            lambda c: c["seconds"].update({name: "abc"}),
            f"example.json.seconds.{name} = 'abc': should be",
        ),
        (
            FILES[2],
            lambda c: c["seconds"].update({name: -1.0}),
            f"example.json.seconds.{name} = -1.0: should be",
        ),
        (
            FILES[2],
            lambda c: c["machine"].update(a={"b": []}),
            "example.json.machine.a: should be a valid string",
        ),
        (FILES[2], lambda c: c.update(versions={}), "example.json.versions: needs python, as text"),
        (
            FILES[2],
            lambda c: c.update(elsewhere={name: {}}),
            f"example.json.elsewhere.{name}: needs device, as t",
        ),
    ):
        if file == FILES[2]:
            content = json.loads(kept[file])
            change(content)
            (folder / file).write_text(json.dumps(content))
        else:
            _change(folder, change, file=file)
        assert message in _refused(folder)
        for each, content in kept.items():
            (folder / each).write_bytes(content)
    (folder / FILES[0]).unlink()
    os.mkfifo(folder / FILES[0])
    assert "example.jsonl: cannot be read: not an ordinary file" in _refused(folder)


def test_what_is_in_the_way_stops_all_of_it(inside, folder):
    (here := inside / "results" / FILES[0]).unlink()
    here.mkdir()
    assert _refused(folder) == f"results/{FILES[0]}: in the way of results/{FILES[0]}; nothing was imported"
    here.rmdir()
    here.write_text("as it was")
    assert sorted(os.listdir(inside / "results")) == ["digits", "environment"]


# ------------------------------------------------------------------------------------------ what is taken in


def _bytes(results):
    return [(results / name).read_bytes() if (results / name).exists() else None for name in FILES]


def test_without_mlflow_and_dvc_the_files_are_there_and_the_rest_is_said(project, folder):
    result = replications(project, "import", str(folder), "--paper", "example")
    assert result.returncode == 0, result.stderr
    assert _bytes(project / "results") == _bytes(folder)
    assert "mlflow is not installed here" in result.stderr
    assert "`dvc commit --force settings example` makes `dvc repro` accept" in result.stderr


KILL = """
import os, pathlib, signal
_write, _move, _calls = pathlib.Path.write_bytes, os.replace, []
def _counted(name):
    _calls.append(name)
    if _calls.count(name) == {calls} and name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
def write(self, content):
    _counted("write")
    return _write(self, content)
def move(source, target):
    _counted("move")
    return _move(source, target)
pathlib.Path.write_bytes, os.replace = write, move
"""


def test_a_kill_before_all_is_written_changes_nothing(project, folder):
    (project / "sitecustomize.py").write_text(BARE + KILL.format(calls=3, name="write"))
    assert replications(project, "import", str(folder)).returncode == -signal.SIGKILL
    assert _bytes(project / "results") == [None] * 4
    (project / "sitecustomize.py").write_text(BARE)
    assert replications(project, "import", str(folder)).returncode == 0
    assert _bytes(project / "results") == _bytes(folder)
    assert sorted(os.listdir(project / "results")) == ["digits", "environment"]


def test_what_a_kill_leaves_half_moved_the_next_import_finishes_first(project, folder):
    # the first move is of all files at once, the next ones of one file each
    (project / "sitecustomize.py").write_text(BARE + KILL.format(calls=3, name="move"))
    assert replications(project, "import", str(folder)).returncode == -signal.SIGKILL
    assert _bytes(project / "results").count(None) == 3
    (project / "sitecustomize.py").write_text(BARE)
    assert replications(project, "import", str(project / "nowhere")).returncode == 2
    assert _bytes(project / "results") == _bytes(folder)
    assert sorted(os.listdir(project / "results")) == ["digits", "environment"]


def test_an_imported_stage_is_logged_once_and_not_trained_again(project, folder):
    (project / "sitecustomize.py").unlink()
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        assert run(project, *command).returncode == 0
    for _ in range(2):
        result = replications(project, "import", str(folder))
        assert result.returncode == 0, result.stderr
        assert result.stdout == "example: 6 runs imported\n" and "failed" not in result.stderr
    code = (
        "import json, mlflow; c = mlflow.MlflowClient('sqlite:///mlflow.db');"
        "e = c.get_experiment_by_name('pruning-replications/example');"
        "found = c.search_runs([e.experiment_id]);"
        "print(json.dumps([[r.data.tags, r.info.start_time, r.info.end_time] for r in found]))"
    )
    logged = json.loads(run(project, "python", "-c", code).stdout)
    tags = [own for own, _, _ in logged]
    stages = [own for own in tags if "mlflow.parentRunId" not in own]
    assert len(tags) == 7 and [own["machine.device"] for own in stages] == ["a machine elsewhere"]
    # they began and ended when they were trained
    about = json.loads((folder / FILES[2]).read_text())
    times = {own.get("settings_hash"): (start, end) for own, start, end in logged}
    for name, ended in about["ended"].items():
        begun = ended - about["seconds"][name]
        assert times[name] == pytest.approx((1000 * begun, 1000 * ended), rel=0, abs=2)
    repro = run(project, "dvc", "repro", "example")
    assert repro.returncode == 0, repro.stderr
    assert "Running stage" not in repro.stdout and "didn't change" in repro.stdout
    assert not (project / ".runs").exists() and _bytes(project / "results") == _bytes(folder)
