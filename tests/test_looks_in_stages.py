"""Looks in real stages: what is bought, killed, raised, imported and listed for a machine without SciPy."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from project import BARE, environment, only_example, params, replications, run

from common.core import loading
from common.core.identity import canonical
from common.settings import DatasetSettings

pytestmark = pytest.mark.slow

RESULTS = tuple(f"results/digits/example.{name}" for name in ("jsonl", "curves.jsonl", "predictions.npz"))
BESIDE = "results/environment/digits/example.json"
STAGE = ("run", "example")
TARGETS = (0.5, 0.8, 0.9)


def _claim(name, target, **fields):
    sides = {
        "treatment": {"variant": "pruned", "target": target},
        "control": {"variant": "dense", "target": 0.0},
    }
    return {"id": name, "statement": "Pruning costs nothing.", **sides, "scale": "points", **fields}


DIGITS = {"source": "digits", "train": 200, "validation": 100}
TIE = {"test": "equivalence", "matters": 0.001}
CLAIMS = [  # the first is decided at the first look, the second never, the third is ours
    _claim("E1", 0.9, test="superiority", direction="lower"),
    _claim("E2", 0.5, **TIE),
    _claim("E3", 0.8, role="probe", **TIE),
]
BOUGHT = {("dense", 0.0): 9, ("pruned", 0.5): 9, ("pruned", 0.8): 5, ("pruned", 0.9): 5}


def _claims(project, claims):
    file = project / "replications/example/claims.yaml"
    file.write_text(yaml.safe_dump({"paper": "example", "claims": claims}, sort_keys=False))


def _plan(project, count=9, looks=(5, 7, 9), workers=2, dataset=DIGITS, **settings):
    execution = {"device": "cpu", "precision": "float32", "workers": workers}
    seeds = {"first": 100, "count": count, "looks": list(looks)}
    example = {"targets": list(TARGETS), **settings}
    params(project, dataset=dataset, execution=execution, seeds=seeds, example=example)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    project = only_example(tmp_path_factory.mktemp("base"))
    _claims(project, CLAIMS)
    _plan(project)
    return project


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A copy in which the stage has come to its end."""
    project = shutil.copytree(base, tmp_path_factory.mktemp("whole") / "project")
    _done(project)
    return project


@pytest.fixture
def project(base, tmp_path):
    return shutil.copytree(base, tmp_path / "project")


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "project")


def _done(project, *options):
    result = replications(project, *STAGE, *options)
    assert result.returncode == 0, result.stderr
    return result


def _bytes(project):
    return [(project / name).read_bytes() for name in RESULTS]


def _records(project):
    return [json.loads(line) for line in (project / RESULTS[0]).read_text().splitlines()]


def _seeds(project):
    return dict(Counter((record["variant"], record["target"]) for record in _records(project)))


def _kept(project):
    return {file.name: file.stat().st_mtime_ns for file in (project / ".runs/digits/example").glob("*.json")}


def _verdicts(project, records="results/digits"):
    arguments = ("--records", records, "--claims", "replications", "--profile", "digits", "--out", "v.json")
    result = run(project, "python", "-m", "common.statistics", *arguments)
    assert result.returncode == 0, result.stderr
    return (project / "v.json").read_bytes()


@pytest.mark.long
def test_shards_look_by_look_leave_what_one_command_does(project, whole):
    said = []
    while not said or said[-1].returncode == 3:
        _done(project, "--shard", "1/1")
        said.append(replications(project, "collect", "example"))
        assert len(said) <= 3, said
    assert [each.returncode for each in said] == [3, 3, 0]
    assert (
        "its claims are open and wait for 4 further runs (2 dense, 2 pruned; seeds 105 to 106)"
        in said[0].stderr
    )
    assert _bytes(project) == _bytes(whole)


# ------------------------------------------------------------------------------------------ what is bought


def test_seeds_are_bought_for_open_claims_alone_and_judged_at_their_looks(finished):
    assert _seeds(finished) == BOUGHT
    verdicts = json.loads(_verdicts(finished))
    assert [look["seeds"] for look in verdicts["looks"]] == [5, 7, 9]
    found = {claim["id"]: claim for claim in verdicts["papers"]["example"]["claims"]}
    assert {name: claim["verdict"] for name, claim in found.items()} == {
        "E1": "replicated",
        "E2": "open",
        "E3": "open",
    }
    assert {name: claim["comparisons"][0]["look"] for name, claim in found.items()} == {
        "E1": 5,
        "E2": 9,
        "E3": 5,
    }


def test_shuffled_records_give_the_same_verdicts(finished):
    expected = _verdicts(finished)
    lines = (finished / RESULTS[0]).read_text().splitlines()
    random.Random(1).shuffle(lines)
    (finished / "shuffled").mkdir()
    (finished / "shuffled/example.jsonl").write_text("\n".join(lines))
    shutil.copy(finished / RESULTS[2], finished / "shuffled")
    assert _verdicts(finished, "shuffled") == expected


@pytest.mark.parametrize("workers", [1, 8])
def test_the_workers_change_no_byte(project, whole, workers):
    _plan(project, workers=workers)
    _done(project)
    assert _bytes(project) == _bytes(whole)


def test_one_seed_alone_has_the_same_records(project, whole):
    _plan(project, count=1)
    settings = yaml.safe_load((project / "params.yaml").read_text())
    settings["profiles"]["digits"]["seeds"]["first"] = 107
    (project / "params.yaml").write_text(yaml.safe_dump(settings))
    _done(project)
    alone = {line for line in (project / RESULTS[0]).read_text().splitlines() if '"seed":107' in line}
    together = {line for line in (whole / RESULTS[0]).read_text().splitlines() if '"seed":107' in line}
    assert len(alone) == 4 and len(together) == 2 and together < alone


def test_a_raised_count_trains_only_what_is_new(project, whole):
    _plan(project, count=5)
    _done(project)
    before = _kept(project)
    assert _seeds(project) == dict.fromkeys(BOUGHT, 5)
    _plan(project)
    _done(project)
    assert _bytes(project) == _bytes(whole)
    assert before.items() <= _kept(project).items()


@pytest.mark.long
def test_decide_runs_judges_and_draws_and_the_plan_says_what_is_missing(finished):
    decided = replications(finished, "decide", "--profile", "digits")
    assert decided.returncode == 0, decided.stderr
    assert (finished / "reports/digits/verdicts.json").read_bytes() == _verdicts(finished)
    assert (finished / "reports/digits/index.html").exists() and _seeds(finished) == BOUGHT
    claims = {c["id"]: c for c in json.loads(_verdicts(finished))["papers"]["example"]["claims"]}
    planned = replications(finished, "plan", "--seconds", "0").stdout.splitlines()
    rows = {tuple(line.split()[:5]) for line in planned if line.startswith("example ")}
    needs = {name: f"{claims[name]['needs']:,}" for name in ("E2", "E3")}
    assert {
        ("example", "E2", "supporting", "9", needs["E2"]),
        ("example", "E3", "probe", "5", needs["E3"]),
    } < rows
    assert not any("E1" in row for row in rows)
    assert any(line.endswith("for the 2 of 2 that seeds can decide") for line in planned)


# ------------------------------------------------------------------------------------------ interrupted


@pytest.mark.long
def test_ten_kills_inside_and_between_looks_change_no_byte(project, whole):
    variables = environment(PYTHONPATH=str(project))
    kills = 0
    # in runs: 20 of the first look, 24 with the second, 28 with the third; the last kills are while files are written
    for runs in (2, 7, 13, 19, 20, 21, 23, 24, 26, 28):
        process = subprocess.Popen(
            [sys.executable, "-m", "replications", *STAGE],
            cwd=project,
            env=variables,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while len(list((project / ".runs/digits/example").glob("*.json"))) < runs and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 9
    _done(project)
    assert _bytes(project) == _bytes(whole)
    assert not (project / "results/partial/digits/example.jsonl").exists()


@pytest.mark.long
def test_a_stop_between_looks_leaves_the_look_before(project):
    # the time is over before the second look begins
    (project / "sitecustomize.py").write_text(
        BARE + "import time\n_time, _start = time.time, time.time()\n"
        "import os\nfirst = 'results/digits/example.jsonl'\n"
        "time.time = lambda: _time() + (1e6 if os.path.exists(first) else 0)\n"
    )
    stopped = replications(project, *STAGE, "--time-budget", "10m")
    assert stopped.returncode == 3 and "the time budget is spent" in stopped.stderr
    assert _seeds(project) == dict.fromkeys(BOUGHT, 5)
    (project / "sitecustomize.py").write_text(BARE)
    _done(project)
    assert _seeds(project) == BOUGHT


# ------------------------------------------------------------------------------------------ records are a cache


def test_records_count_as_done_where_nothing_else_is_left(finished, whole):
    shutil.rmtree(finished / ".runs")
    (finished / "replications/example/protocol.py").touch()
    _claims(finished, [{**claim, "statement": "In other words."} for claim in CLAIMS])
    begun = time.time()
    _done(finished)
    assert _bytes(finished) == _bytes(whole)
    assert not list((finished / ".runs/digits/example").glob("*.pt"))  # no network was trained
    about = json.loads((finished / BESIDE).read_text())
    assert about["seconds"] == json.loads((whole / BESIDE).read_text())["seconds"] and time.time() > begun


@pytest.mark.long
def test_a_network_is_trained_again_only_for_what_starts_from_it(finished, whole):
    shutil.rmtree(finished / ".runs")
    _plan(finished, count=11, looks=(5, 7, 11))  # two more seeds, whose dense networks are new
    _done(finished)
    assert len(list((finished / ".runs/digits/example").glob("*.pt"))) == 2
    assert {line for line in _bytes(whole)[0].splitlines()} < {
        line for line in _bytes(finished)[0].splitlines()
    }
    # with a claim on what was not bought, old dense networks are needed
    shutil.rmtree(finished / ".runs")
    _claims(finished, [*CLAIMS[:2], _claim("E3", 0.8, **TIE)])
    _done(finished)
    assert _seeds(finished) == {**BOUGHT, ("dense", 0.0): 11, ("pruned", 0.5): 11, ("pruned", 0.8): 11}
    assert len(list((finished / ".runs/digits/example").glob("*.pt"))) == 6


@pytest.mark.long
@pytest.mark.parametrize("change", ["code", "settings", "execution", "damage", "torch"])
def test_a_record_of_something_else_does_not_count(finished, change):
    shutil.rmtree(finished / ".runs")
    protocol, about = finished / "replications/example/protocol.py", finished / BESIDE
    if change == "code":
        protocol.write_text(protocol.read_text() + "\n# changed\n")
    elif change == "settings":
        _plan(finished, seconds=0.01)
    elif change == "execution":
        text = (finished / "params.yaml").read_text()
        (finished / "params.yaml").write_text(text.replace("workers: 2", "workers: 2\n      threads: 2"))
    elif change == "damage":
        (finished / RESULTS[0]).write_text(
            (finished / RESULTS[0]).read_text().replace('"seed":101', '"seed":103', 1)
        )
    else:
        _rewritten(finished, lambda record: {**record, "torch": "1.0"})
    result = _done(finished)
    assert len(list((finished / ".runs/digits/example").glob("*.pt"))) == 9  # all dense networks
    assert ("damaged or changed: no record there counts" in result.stderr) == (change == "damage")
    assert about.exists()


def _rewritten(project, change, **beside):
    """Change the records as another machine would have left them."""
    content = "".join(canonical(change(record)) + "\n" for record in _records(project)).encode()
    (project / RESULTS[0]).write_bytes(content)
    about = json.loads((project / BESIDE).read_text())
    about["sha256"][Path(RESULTS[0]).name] = hashlib.sha256(content).hexdigest()
    (project / BESIDE).write_text(json.dumps({**about, **beside}))


@pytest.mark.long
def test_an_imported_record_is_not_trained_again(base, finished, tmp_path):
    machine = {"device": "a GPU", "cores": 1, "system": "Linux"}
    _rewritten(finished, lambda r: {**r, "device": "cuda", "precision": "bfloat16"}, machine=machine)
    project = shutil.copytree(base, tmp_path / "here/project")
    taken = replications(project, "import", str(finished / "results"))
    assert taken.returncode == 0, taken.stderr
    before = _bytes(project)
    _claims(project, [{**claim, "statement": "In other words."} for claim in CLAIMS])
    for _ in range(2):
        _done(project)
        assert _bytes(project) == before and not list((project / ".runs/digits/example").glob("*.pt"))
        about = json.loads((project / BESIDE).read_text())
        assert set(about["elsewhere"]) == {record["settings_hash"] for record in _records(project)}
    # an import of fewer looks would lose what is here
    _plan(project, count=11, looks=(5, 7, 11))
    _done(project)
    refused = replications(project, "import", str(finished / "results"))
    assert refused.returncode == 2
    assert "holds 4 finished runs that the results to be imported lack; move it away" in refused.stderr


# ------------------------------------------------------------------------------------------ changed claims


def test_a_changed_claim_is_judged_by_new_seeds_alone(finished):
    _plan(finished, count=14, looks=(5, 7, 9))
    changed = _claim("E1", 0.9, test="superiority", direction="lower", seen=108)
    _claims(finished, [changed, *CLAIMS[1:]])
    _done(finished)
    assert (
        _seeds(finished)["pruned", 0.9] == 10
    )  # the first five, which are not thrown away, and five new ones
    claim = json.loads(_verdicts(finished))["papers"]["example"]["claims"][0]
    assert claim["verdict"] == "replicated" and claim["seen"] == 108
    assert claim["comparisons"][0]["seeds"] == [109, 110, 111, 112, 113]


def test_wrong_claims_stop_before_anything_is_trained(project):
    _claims(project, [{**CLAIMS[0], "test": "guess"}])
    result = replications(project, *STAGE)
    assert result.returncode == 2 and "claim E1.test = 'guess'" in result.stderr
    assert not (project / ".runs").exists()


# ------------------------------------------------------------------------------------------ without SciPy

WITHOUT_SCIPY = BARE + "sys.modules['scipy'] = None\n"


@pytest.fixture
def without(project):
    """A project with images that no package brings, on a machine without SciPy."""
    digits = loading.load(DatasetSettings(train=200, validation=100, test=100))
    arrays = {}
    for part in ("train", "test"):
        arrays |= {f"x_{part}": digits.images[part].numpy(), f"y_{part}": digits.labels[part].numpy()}
    np.savez(project / "own.npz", **arrays)
    _plan(
        project,
        count=7,
        looks=(5, 7),
        dataset={"source": "npz", "path": "own.npz", "train": 150, "validation": 40},
    )
    (project / "sitecustomize.py").write_text(WITHOUT_SCIPY)
    return project


def test_one_look_needs_no_scipy(without):
    text = (without / "params.yaml").read_text()
    (without / "params.yaml").write_text(text.replace("count: 7", "count: 5"))
    assert "scipy" not in _done(without).stderr
    assert _seeds(without) == dict.fromkeys(BOUGHT, 5)


@pytest.mark.long
def test_without_scipy_the_first_look_is_trained_and_then_what_is_listed(without, tmp_path):
    stopped = _done(without)
    assert "scipy" in stopped.stderr and "python -m replications open example > FILE" in stopped.stderr
    assert _seeds(without) == dict.fromkeys(BOUGHT, 5)
    assert "error: scipy" in replications(without, "open", "example").stderr
    elsewhere = shutil.copytree(without, tmp_path / "elsewhere/project")
    (elsewhere / "sitecustomize.py").write_text(BARE)
    listed = replications(elsewhere, "open", "example")
    assert listed.returncode == 0 and listed.stdout
    (without / "list").write_text(listed.stdout)
    _done(without, "--only", "list")
    _done(elsewhere)
    assert _bytes(without) == _bytes(elsewhere)
    assert replications(elsewhere, "open", "example").stdout == ""


@pytest.mark.long
def test_a_wrong_list_is_named(project):
    for text, message in (
        ("", "list: names no run"),
        (
            '{"paper":"example","variant":"other","dataset":"d","architecture":"a","target":0,"seed":1}',
            "list, line 1: example/other a target 0 seed 1 is not listed here",
        ),
    ):
        (project / "list").write_text(text)
        wrong = replications(project, *STAGE, "--only", "list")
        assert wrong.returncode == 2 and message in wrong.stderr


@pytest.mark.long
def test_a_list_alone_is_not_a_whole_stage(project, whole, tmp_path):
    listed = [run for run in _records(whole) if run["seed"] >= 105]
    (project / "list").write_text("\n".join(json.dumps(run) for run in listed))
    _done(project, "--only", "list")
    assert _seeds(project) == {("dense", 0.0): 4, ("pruned", 0.5): 4}
    assert json.loads((project / BESIDE).read_text())["unfinished"] == 20
    _done(project)
    assert _bytes(project) == _bytes(whole)
    assert "unfinished" not in json.loads((project / BESIDE).read_text())
