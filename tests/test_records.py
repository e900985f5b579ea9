"""Records: what they say of a run, of which kind a failure is, and that files of any revision are read alike."""

import ast
import json
from dataclasses import replace
from typing import get_args

import pytest
from made_up_jobs import DATA, MadeUp, made_up
from project import ROOT
from pydantic_core import to_jsonable_python

from common import records
from common.core import loading
from common.core.failures import Diverged, OutOfMemory, RunFailed, Unreachable
from common.core.identity import canonical
from common.core.pruning.masks import Infeasible
from common.core.run import Outcome
from common.records import Cause, Curves, Failure, Record
from common.report.evidence import finite
from common.settings import ExecutionSettings, SettingsError
from common.stage.store import Store
from common.stage.worker import perform
from common.statistics.records import Lost, Quantity, Records

IDENTITY = {"paper": "example", "variant": "v", "dataset": "d", "architecture": "a", "target": 0.5, "seed": 3}
MINIMAL = {**IDENTITY, "status": "ok"}


@pytest.fixture
def performed(tmp_path, monkeypatch):
    """A function that performs runs of made-up jobs that do what is given; returns the last one's record."""

    def performed(execute, *runs, precision="float32"):
        monkeypatch.setattr(MadeUp, "does", staticmethod(execute), raising=False)
        execution = ExecutionSettings(device="cpu", precision=precision)
        store = Store(tmp_path, execution)
        for run in runs:
            record = perform(run, store, execution, True).record
            assert store.load(run).record == record
        return record

    return performed


def _raises(error):
    def execute(context):
        raise error

    return execute


# ------------------------------------------------------------------------------------------ what a record says


def test_a_finished_run_says_chance_and_what_it_was_executed_with(performed):
    import torch

    outcome = Outcome({"test_accuracy": 0.5, "bad": float("nan")}, {"macs": 1})
    run = made_up()
    record = performed(lambda context: outcome, run)
    labels = loading.load(DATA).labels["test"].tolist()
    assert record.chance == max(map(labels.count, labels)) / len(labels) and 0.1 <= record.chance < 0.11
    assert (record.device, record.precision, record.torch) == ("cpu", "float32", torch.__version__)
    assert record.identity == run.identity and record.settings_hash == run.settings_hash
    content = record.content()
    assert content["metrics"] == {"test_accuracy": 0.5, "bad": None}
    assert not {"reason", "failure", "cause"} & set(content)


def test_records_of_another_number_format_differ_in_nothing_else(performed):
    first, second = (
        performed(lambda context: Outcome({"test_accuracy": 0.5}, {}), made_up(), precision=name).content()
        for name in ("float32", "bfloat16")
    )
    assert {key for key in first if first[key] != second[key]} == {"precision"} and set(first) == set(second)


@pytest.mark.parametrize(
    ("data", "known"),
    [(DATA, True), ([DATA, DATA.model_copy(update={"test": 10})], True), (None, False)],
)
def test_chance_is_that_of_the_data_a_run_is_tested_on(performed, data, known):
    run = replace(made_up(), settings={"data": to_jsonable_python(data)})
    record = performed(lambda context: Outcome({}, {}), run)
    assert record.chance == pytest.approx(0.1, abs=0.01) if known else record.chance is None


# ------------------------------------------------------------------------------------------ kinds of failures


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Diverged("the training loss is nan"), "diverged"),
        (Unreachable("out of range"), "unreachable"),
        (Infeasible("the layers hold only 10"), "unreachable"),
        (RunFailed("a reason of a paper of one's own"), "unreachable"),
        (OutOfMemory("a batch of 4 fits"), "resources"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "resources"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "resources"),
    ],
)
def test_a_failure_has_its_kind_and_chance(performed, error, kind):
    record = performed(_raises(error), made_up())
    assert (record.status, record.failure, record.cause) == ("failed", kind, None)
    assert record.chance == pytest.approx(0.1, abs=0.01) and record.reason and record.device == "cpu"


def test_a_chain_of_needs_names_the_run_that_failed_first(performed):
    dense = made_up()
    pruned = made_up("pruned", needs=(dense,))
    tuned = made_up("tuned", needs=(pruned,))
    record = performed(_raises(Diverged("nan")), dense, pruned, tuned)
    root = Cause(**dense.identity, settings_hash=dense.settings_hash, failure="diverged")
    assert (record.failure, record.cause) == ("needs", root)
    assert record.reason.startswith(f"it starts from {pruned}, which failed: it starts from {dense}")
    assert record.chance == pytest.approx(0.1, abs=0.01)


def _kinds(kind):
    return {kind, *(found for own in kind.__subclasses__() for found in _kinds(own))}


def test_every_failure_that_the_project_raises_has_a_kind():
    """What is raised is a subclass that says its kind; the others are what a scheduler alone can know."""
    files = [*(ROOT / "common").rglob("*.py"), *(ROOT / "replications").rglob("*.py")]
    calls = (
        node.exc.func
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    )
    raised = {getattr(call, "id", getattr(call, "attr", None)) for call in calls}
    kinds = {kind.__name__: kind.failure for kind in _kinds(RunFailed)}
    assert {"Unreachable", "Diverged", "OutOfMemory", "Infeasible"} <= raised & set(kinds)
    assert "RunFailed" not in raised
    assert set(kinds.values()) == set(get_args(Failure)) - {"died", "error", "needs"}


# ------------------------------------------------------------------------------------------ files


def test_a_record_is_written_as_it_is_read(tmp_path):
    cause = {**IDENTITY, "variant": "dense", "settings_hash": "f" * 64, "failure": "died"}
    content = MINIMAL | {
        "settings": {"x": None},
        "settings_hash": "e" * 64,
        "data": ["d"],
        "metrics": {"y": None},
    }
    content |= {"cost": {}, "details": {"z": [None, {"w": None}]}, "status": "failed", "reason": "r"}
    content |= {"failure": "needs", "cause": cause, "chance": 0.5, "device": "cuda", "precision": "bfloat16"}
    content |= {"torch": "2.0", "predictions": "0" * 64}
    assert set(content) == set(Record.model_fields)
    file = tmp_path / "a.jsonl"
    file.write_text(canonical(content) + "\n\n")
    ((where, record),) = records.read(file, Record)
    assert where == f"{file}, line 1" and canonical(record.content()) == canonical(content)


def test_an_earlier_revision_lacks_fields_and_a_later_one_has_more(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(MINIMAL) + "\n" + json.dumps(MINIMAL | {"colour": 1}) + "\n")
    (_, earlier), (_, later) = records.read(file, Record)
    assert earlier == later
    new = ("chance", "failure", "cause", "device", "precision", "torch")
    assert {getattr(earlier, name) for name in new} == {None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (MINIMAL | {"chance": 1.5}, "a.jsonl, line 2.chance = 1.5: should be less than or equal to 1"),
        (MINIMAL | {"failure": "bored"}, "a.jsonl, line 2.failure = 'bored': should be 'diverged', 'unreach"),
        (MINIMAL | {"cause": IDENTITY}, "a.jsonl, line 2.cause.settings_hash: missing"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(MINIMAL) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(SettingsError) as error:
        list(records.read(file, Record))
    assert message in str(error.value)


def test_damaged_records_and_curves_are_told_in_the_same_words(tmp_path):
    messages = []
    for kind in (Record, Curves):
        file = tmp_path / f"{kind.__name__}.jsonl"
        for damaged in (b'{"paper": "exa', b"[" * 100_000):
            file.write_bytes(damaged)
            with pytest.raises(SettingsError) as error:
                list(records.read(file, kind))
            messages.append(str(error.value).replace(file.name, "FILE"))
    assert messages[:2] == messages[2:]
    assert all("FILE, line 1: not valid JSON (half written?)" in message for message in messages)


def test_a_number_that_no_float_can_hold_is_not_a_measurement():
    content = MINIMAL | {"metrics": {"near_zero": 10**400}}
    judged = Records([Record.model_validate(content)])
    names = [content[name] for name in ("variant", "dataset", "architecture", "target")]
    with pytest.raises(Lost, match="not a finite number"):
        judged.measure(Quantity(*names, "near_zero"), content["seed"])
    assert finite(10**400) is None and finite(10**90) == 1e90


def test_lines_of_json_are_read_in_one_place():
    """No other file of the project takes JSON lines apart or knows how a line can be damaged."""
    for file in [*(ROOT / "common").rglob("*.py"), *(ROOT / "replications").glob("*.py")]:
        if file != ROOT / "common" / "records.py":
            assert not any(part in file.read_text() for part in ("half written?", "json.loads(line)")), file
