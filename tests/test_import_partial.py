"""What a stopped stage has finished: taken in elsewhere, judged, shown as incomplete, and gone on from."""

import hashlib
import json
import os
import shutil
import signal
import time

import pytest
from project import only_example, params, replications, run, start

from common.core.identity import canonical
from common.records import Entry
from common.stage import partial

pytestmark = pytest.mark.slow

PART = "partial/digits/example.jsonl"
RECORDS = "digits/example.jsonl"
BESIDE = "environment/digits/example.json"


def _write(file, about, entries):
    """Write such a file as another machine would have left it."""
    texts = [canonical(content).encode() for content in (about, *entries)]
    lines = [hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n" for text in texts]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(lines))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The other machine, on which the stage has come to its end later."""
    project = only_example(tmp_path_factory.mktemp("there"))
    result = replications(project, "run", "example")
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture
def folder(there, tmp_path):
    """Results of when three runs were finished: both of seed 0, and the dense network of seed 1."""
    about = json.loads((there / "results" / BESIDE).read_text())
    about = {key: about[key] for key in ("code", "versions", "precision", "numerics")}
    about["machine"] = {"device": "a machine elsewhere"}
    kept = [_entry(file) for file in (there / ".runs/digits/example").glob("*.json")]
    records = {(entry.record.seed, entry.record.variant): entry for entry in kept}
    taken = [records[place] for place in ((1, "dense"), (0, "dense"), (0, "pruned"))]
    entries = [entry.model_copy(update={"machine": about["machine"]}) for entry in taken]
    _write(tmp_path / "copy" / PART, about, entries)
    return tmp_path / "copy"


def _entry(file):
    return Entry.model_validate_json(file.read_text().partition("\n")[2])


@pytest.fixture
def project(tmp_path):
    return only_example(tmp_path)


def _refused(project, folder, *options):
    result = replications(project, "import", str(folder), *options)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (project / ".runs").exists()
    return result.stderr


def _kept(project):
    """When each run was kept, by seed and variant."""
    files = (project / ".runs/digits/example").glob("*.json")
    entries = {file: _entry(file).record for file in files}
    return {(record.seed, record.variant): file.stat().st_mtime_ns for file, record in entries.items()}


# ------------------------------------------------------------------------------------------ what is refused


def test_it_is_taken_in_only_when_asked_for(project, folder):
    message = _refused(project, folder)
    assert "holds no <profile>/<paper>.jsonl; `--partial` takes what its stages have finished" in message
    assert not (project / "results").exists()


def test_what_is_not_of_this_project_is_refused_by_name(project, folder):
    about, entries = partial.read(folder / PART)
    params(project, example={"training": {"epochs": 3}})
    assert "settings.training.epochs = 2, here 3" in _refused(project, folder, "--partial")
    params(project)
    _write(folder / PART, about, [*entries, entries[0]])
    assert "is given twice or not listed here" in _refused(project, folder, "--partial")
    _write(folder / PART, about | {"code": "0" * 64}, entries)
    assert f"{PART}: made by other code (digest 0" in _refused(project, folder, "--partial")
    _write(folder / PART, {key: value for key, value in about.items() if key != "numerics"}, entries)
    assert f"{PART}, line 1.numerics: " in _refused(project, folder, "--partial")
    for text, message in (
        (entries[1].predictions, "target 0, seed 1 are missing or changed"),
        (None, "target 0, seed 1 are missing or changed"),
        ("no text", f"{PART}: predictions that are not readable: "),
    ):
        other = entries[0].model_copy(update={"predictions": text})
        _write(folder / PART, about, [other, *entries[1:]])
        assert message in _refused(project, folder, "--partial")
    (folder / PART).write_bytes(b"")
    assert f"{PART}: it was stopped before it held anything" in _refused(project, folder, "--partial")
    assert not (project / "results").exists()


def test_it_does_not_replace_what_is_more(project, folder):
    about, entries = partial.read(folder / PART)
    assert replications(project, "import", str(folder), "--partial").returncode == 0
    shutil.rmtree(project / ".runs")
    before = (project / "results" / RECORDS).read_bytes()
    _write(folder / PART, about, entries[1:])
    message = _refused(project, folder, "--partial")
    assert f"results/{RECORDS}: holds 1 finished runs that the results to be imported lack" in message
    assert (project / "results" / RECORDS).read_bytes() == before


# ------------------------------------------------------------------------------------------ what is taken in


def test_it_is_judged_and_shown_as_incomplete(project, folder):
    result = replications(project, "import", str(folder), "--partial")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "example: 3 of 6 runs imported\n"
    assert "example is not complete, so DVC is not told of it" in result.stderr
    about = json.loads((project / "results" / BESIDE).read_text())
    assert about["unfinished"] == 3 and about["elsewhere"] == {} and len(about["seconds"]) == 3
    lines = [json.loads(line) for line in (project / "results" / RECORDS).read_text().splitlines()]
    assert lines == [entry.record.content() for entry in _in_order(folder)]
    planned = replications(project, "plan", "--seconds", "0").stdout
    assert "example: the results hold 3 of 6 runs: 3 from a machine elsewhere; they are not" in planned
    judged = ("--records", "results/digits", "--claims", "replications", "--out", "v.json")
    assert run(project, "python", "-m", "common.statistics", *judged).returncode == 0
    drawn = ("--profile", "digits", "--results", "results/digits", "--replications", "replications")
    drawn += ("--verdicts", "v.json", "--out", "page")
    result = run(project, "python", "-m", "common.report", *drawn)
    assert result.returncode == 0, result.stderr
    page = (project / "page/index.html").read_text()
    assert "The stage was stopped before its end: 3 of its runs are not here." in page


def _in_order(folder):
    """As the protocol lists the runs: by seed, the dense network first."""
    return sorted(partial.read(folder / PART)[1], key=lambda e: (e.record.seed, e.record.variant))


def test_a_run_goes_on_from_it_and_repeats_only_what_others_start_from(project, there, folder):
    assert replications(project, "import", str(folder), "--partial").returncode == 0
    before = _kept(project)
    assert set(before) == {(0, "dense"), (0, "pruned"), (1, "dense")}
    planned = replications(project, "plan", "--seconds", "0").stdout
    assert planned.splitlines()[3].split()[:3] == ["example", "6", "3"]
    assert replications(project, "run", "example").returncode == 0
    after = _kept(project)
    assert {run for run, time in before.items() if after[run] != time} == {(1, "dense")}
    # on the same machine the same bytes, whoever did what
    assert (project / "results" / RECORDS).read_bytes() == (there / "results" / RECORDS).read_bytes()
    beside = json.loads((project / "results" / BESIDE).read_text())
    assert set(beside["elsewhere"]) == {e.record.settings_hash for e in _in_order(folder)[:2]}
    assert "unfinished" not in beside
    planned = replications(project, "plan", "--seconds", "0").stdout
    assert "example: the results hold 6 of 6 runs: 2 from a machine elsewhere, 4 from " in planned


def test_a_machine_of_another_kind_trains_all(project, folder):
    about, entries = partial.read(folder / PART)
    about["numerics"][0] = "cuda"
    _write(folder / PART, about, entries)
    assert replications(project, "import", str(folder), "--partial").returncode == 0
    assert len(_kept(project)) == 3
    planned = replications(project, "plan", "--seconds", "0").stdout
    assert planned.splitlines()[3].split()[:3] == ["example", "6", "0"]


def test_a_killed_stage_leaves_what_it_had_finished(project):
    params(project, example={"seconds": 2.0})
    there = project.parent / "killed"
    shutil.copytree(project, there)
    process = start(there, "python", "-m", "replications", "run", "example", PYTHONPATH=str(there))
    deadline = time.monotonic() + 80
    while len(list((there / ".runs/digits/example").glob("*.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)  # from the record that a run keeps to its line in the file
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (there / "results" / RECORDS).exists()
    result = replications(project, "import", str(there / "results"), "--partial")
    assert result.returncode == 0 and result.stdout.endswith(" of 6 runs imported\n")


def test_dvc_does_not_take_it_for_complete(project, folder):
    (project / "sitecustomize.py").unlink()
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        assert run(project, *command).returncode == 0
    assert replications(project, "import", str(folder), "--partial").returncode == 0
    judged = run(project, "dvc", "repro", "--single-item", "--force", "settings", "statistics")
    assert judged.returncode == 0, judged.stderr
    assert "example" in json.loads((project / "reports/digits/verdicts.json").read_text())["papers"]
    repro = run(project, "dvc", "repro", "example")
    assert repro.returncode == 0 and "Running stage 'example'" in repro.stdout
    assert len((project / "results" / RECORDS).read_text().splitlines()) == 6
    code = (
        "import json, mlflow; c = mlflow.MlflowClient('sqlite:///mlflow.db');"
        "e = c.get_experiment_by_name('pruning-replications/example');"
        "print(json.dumps([r.data.tags for r in c.search_runs([e.experiment_id])]))"
    )
    tags = json.loads(run(project, "python", "-c", code).stdout)
    assert len([own for own in tags if "mlflow.parentRunId" in own]) == 6
    stages = [own["machine.device"] for own in tags if "mlflow.parentRunId" not in own]
    assert len(stages) == 2 and "a machine elsewhere" in stages
