"""Predictions: packed small and the same way each time, those of the accuracy that a record reports, damage named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import failed, record
from made_up_jobs import MadeUp, made_up

from common.core.compute import Compute
from common.core.data import Batches
from common.core.identity import stream
from common.core.run import Context, Outcome
from common.predictions import SUFFIX, Predictions, check, packed, predictions_file, unpacked
from common.settings import ROOT, DatasetSettings, ExecutionSettings, SettingsError
from common.stage import worker
from common.stage.papers import load, papers
from common.stage.pipeline import listed
from common.stage.records import predictions_of, results_files
from common.stage.scheduler import in_order
from common.stage.store import Store, data_settings

FILE = Path("results/demo.predictions.npz")
LABELS = [0, 1, 2, 1, 0]
RIGHT, HALF, OTHER = (
    Predictions.of(labels, classes)
    for labels, classes in ((LABELS, LABELS), (LABELS, [0, 1, 2, 2, 2]), ([300, 1], [300, 300]))
)


def test_they_are_found_by_their_digest_in_what_was_packed():
    found = unpacked(packed([RIGHT, OTHER, HALF, RIGHT]), FILE)
    assert list(found) == [RIGHT.digest, HALF.digest, OTHER.digest]
    for one in (RIGHT, HALF, OTHER):
        again = found[one.digest]
        assert again.labels.tolist() == one.labels.tolist() and again.classes.tolist() == one.classes.tolist()
    assert found[HALF.digest].correct.tolist() == [True, True, True, False, False]
    assert found[HALF.digest].accuracy == 0.6 and RIGHT.accuracy == 1.0
    assert unpacked(packed([]), FILE) == {}
    assert predictions_file(Path("results/demo.jsonl")) == FILE


def test_the_digest_is_of_the_true_and_the_predicted_classes():
    alike = Predictions.of([1, 1, 2, 1, 0], HALF.classes)
    assert len({RIGHT.digest, HALF.digest, alike.digest}) == 3
    typed = Predictions.of(torch.tensor(LABELS), np.array([0, 1, 2, 2, 2], np.int8))
    assert typed.digest == HALF.digest == Predictions.from_text(HALF.text).digest


def test_many_runs_are_small_and_give_the_same_bytes():
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 1000)
    hard = random.random(1000) < 0.1
    runs = [
        Predictions.of(
            labels, np.where(hard & (random.random(1000) < 0.5), random.integers(0, 10, 1000), labels)
        )
        for _ in range(200)
    ]
    content = packed(runs)
    assert content == packed(runs) and len(content) < 20_000  # of 200,000 predictions


@pytest.mark.parametrize(
    ("labels", "classes"), [([0, 1], [0]), ([], []), ([[0, 1]], [[0, 1]])], ids=["lengths", "none", "shape"]
)
def test_what_is_no_class_for_each_image_is_refused(labels, classes):
    with pytest.raises(ValueError, match=r"\[images\] each"):
        Predictions.of(labels, classes)


def test_damage_is_named():
    content = packed([RIGHT, HALF])
    for spoilt in (b"", b"no archive", content[:-30]):
        with pytest.raises(SettingsError, match=f"^{FILE}: no readable predictions, or damaged"):
            unpacked(spoilt, FILE)
    noticed = 0
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 255
        try:
            assert set(unpacked(bytes(flipped), FILE)) <= {RIGHT.digest, HALF.digest}, place
        except SettingsError:
            noticed += 1
    assert noticed > len(content) / 2
    for text in ("no base64", "QUJD", HALF.text[:-8]):
        with pytest.raises(ValueError):
            Predictions.from_text(text)


def test_a_record_and_its_predictions_agree():
    found = unpacked(packed([HALF]), FILE)
    check(
        [record("new", 0, 0.6, predictions=HALF.digest), record("old", 0, 0.5), failed("old", 1)], found, FILE
    )
    with pytest.raises(
        SettingsError, match="demo.predictions.npz: the predictions of new, .*seed 0 are missing"
    ):
        check([record("new", 0, 1.0, predictions=RIGHT.digest)], found, FILE)
    with pytest.raises(SettingsError, match=r"new, .*accuracy of 0.6, but its record says 0.61"):
        check([record("new", 0, 0.61, predictions=HALF.digest)], found, FILE)


# ------------------------------------------------------------------------------------------ what a run leaves

DATA = DatasetSettings(source="digits", train=200, validation=100, test=300)


def _trainer(context):
    data = context.dataset(DATA)
    linear = torch.nn.Linear(64, data.classes)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(stream(1, "init")))
    return context.trainer(torch.nn.Sequential(torch.nn.Flatten(), linear), data, 50), data


def _context():
    return Context(made_up(data=DATA), Compute.choose("cpu", "float32"), ())


def test_a_run_keeps_those_of_the_network_whose_accuracy_it_reports(tmp_path):
    context = _context()
    trainer, data = _trainer(context)
    first = context.scores(trainer, data)
    trainer.fit([0.1] * len(trainer.batches))
    last = context.scores(trainer, data)
    assert first["test_accuracy"] != last["test_accuracy"]
    with torch.no_grad():
        (images, labels), *rest = Batches(data, "test").epoch(0)
        expected = trainer.model.eval()(images).argmax(1)
    store = Store(tmp_path, ExecutionSettings())
    for scores in (first, last | {"epochs": 1}):
        found = predictions_of(context, Outcome(scores, {}), store)
        assert found.accuracy == scores["test_accuracy"] and found.labels.tolist() == labels.tolist()
    assert not rest and found.classes.tolist() == expected.tolist()
    assert predictions_of(context, Outcome({"test_accuracy": 0.5}, {}), store) is None


def test_a_network_without_a_finite_loss_has_predictions_too(tmp_path):
    context = _context()
    trainer, data = _trainer(context)
    with torch.no_grad():
        trainer.model[1].bias[0] = float("nan")
    scores = context.scores(trainer, data)
    found = predictions_of(context, Outcome(scores | {"more": 1}, {}), Store(tmp_path, ExecutionSettings()))
    assert scores["test_loss"] != scores["test_loss"] and found.accuracy == scores["test_accuracy"]


def test_a_run_that_takes_over_the_results_of_another_has_its_predictions(tmp_path, monkeypatch):
    def execute(context):
        if context.job.needs:
            return Outcome(context.of(context.job.needs[1]).record.metrics, {})
        trainer, data = _trainer(context)
        trainer.fit([0.1] * len(trainer.batches))
        return Outcome(context.scores(trainer, data), {}, trainer.history)

    monkeypatch.setattr(MadeUp, "does", staticmethod(execute), raising=False)
    execution = ExecutionSettings(device="cpu", precision="float32")
    store = Store(tmp_path, execution)
    first, second = made_up("first", data=DATA), made_up("second", seed=1, data=DATA)
    entries = [worker.perform(run, store, execution, False) for run in (first, second)]
    chosen = worker.perform(made_up("chosen", needs=(first, second), data=DATA), store, execution, False)
    assert chosen.record.predictions == entries[1].record.predictions != None  # noqa: E711
    assert chosen.predictions == entries[1].predictions
    check([chosen.record], unpacked(packed([Predictions.from_text(chosen.predictions)]), FILE), FILE)


MOST = 2
"""Runs of a paper that the test trains."""


def _few(paper, profile):
    """Runs that read the embedded data alone, with all that they need; the cheapest come first."""
    found = {}
    runs = listed(paper, profile)
    for run in sorted(runs, key=lambda run: len(in_order([run]))):
        needed = {each.settings_hash: each for each in in_order([run])}
        embedded = all(data.source == "digits" for each in needed.values() for data in data_settings(each))
        if embedded and len(found | needed) <= MOST:
            found |= needed
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("paper", sorted({*papers()} - {"pretraining_impact"}))  # its corpus is not embedded
def test_in_a_stage_each_run_has_those_of_the_accuracy_that_it_reports(paper, tmp_path):
    profile = load(paper, ROOT / "params.yaml", "digits")
    store = Store(tmp_path, profile.execution)
    runs = _few(paper, profile)
    entries = [worker.perform(run, store, profile.execution, True) for run in runs]
    content = results_files("digits", paper, entries, {"machine": entries[0].machine})
    found = unpacked(content[Path("digits", f"{paper}{SUFFIX}")], FILE)
    assert set(found) == {entry.record.predictions for entry in entries}
    for own in (entry.record for entry in entries):
        assert found[own.predictions].accuracy == own.metrics["test_accuracy"]
        assert len(found[own.predictions].labels) == 1000
