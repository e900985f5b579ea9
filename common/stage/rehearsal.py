"""Rehearsal: what runs will cost on this machine, from a few iterations of each kind of run.

Runs that differ in nothing but their seed are of one kind, and one of them is rehearsed for all. It is executed like any
other run, by the same workers and as many at once, but its trainers train only a few iterations of an epoch and reckon
the rest; epochs of a network, batch and method that have been timed before are reckoned whole. Hooks are called for
every epoch, so a network that shrinks while it trains is timed in each of its shapes. What a method does at single
iterations (`Hooks.stepped`) happens only at those that are trained, and the time that torch.compile takes is left out.

For a card that is not there (`rehearse(..., card)`), each run has a hundredth of its images, a few of which go through each
network here. That says what shapes it comes to have, and time is reckoned from the card's floor for all images: that of
training and evaluations, and of nothing else.
"""

from __future__ import annotations

import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from common.core.data import SPLITS, Batches, Dataset, stratified
from common.core.identity import digest
from common.core.pruning import counting
from common.core.run import Context, Run
from common.core.steps import MOST, WARM_UP
from common.core.trainer import BatchSource, Trainer
from common.records import Entry
from common.settings import ExecutionSettings
from common.stage.floors import FORWARD, Peaks, training_seconds
from common.stage.scheduler import execute, in_order
from common.stage.store import SCRATCH, OutOfTime, RunCheckpoints, StageError, Store, TimeBudget

TIMED_SECONDS = 0.05
"""Iterations are timed for about so long, two at least."""
EVALUATED_MACS = 2e9
"""On a CPU, an evaluation is timed on so many images that their MACs add up to this, one at least."""
FEW = 8
"""Images that go through a network whose time is reckoned for a card."""
SHARE, FEWEST = 100, 400
"""For a card, one in so many images is there, but at least so many of a split."""
MEASURING = 0.8
"""The share of the time after which what is still unknown is reckoned from MACs."""


@dataclass(frozen=True)
class Kind:
    """Runs that differ in nothing but their seed. run: the one that is rehearsed; what it needs are such ones, too."""

    run: Run
    members: tuple[Run, ...]


@dataclass(frozen=True)
class Cost:
    """Of one run: seconds of its worker, epochs in all, bytes that it leaves (record twice, and state).

    from_macs: whether some of its epochs or evaluations are reckoned from those of another network. problem: why
    it could not be rehearsed to its end.
    """

    seconds: float
    epochs: float
    disk: float
    from_macs: bool = False
    problem: str | None = None


def kinds(runs: Sequence[Run]) -> list[Kind]:
    """The kinds of `runs` and of all that they need, needed ones first."""
    members: dict[str, list[Run]] = {}
    stand_ins: dict[str, Run] = {}
    by_name: dict[str, Run] = {}
    for run in in_order(runs):
        needs = tuple(stand_ins[need.settings_hash] for need in run.needs)
        what = {**run.identity, "seed": None, "settings": run.settings}
        name = digest([what, [need.settings_hash for need in needs]])
        stand_ins[run.settings_hash] = by_name.setdefault(name, replace(run, needs=needs))
        members.setdefault(name, []).append(run)
    return [Kind(by_name[name], tuple(found)) for name, found in members.items()]


def rehearse(
    stages: Mapping[str, Sequence[Kind]],
    execution: ExecutionSettings,
    seconds: float,
    card: Peaks | None = None,
) -> dict[str, Cost]:
    """The cost of each kind, by the settings hash of its `run`, in about `seconds` seconds.

    card: where it is to be reckoned for, at its floor, in place of this machine. Stages take turns, so that each has some of
    its kinds rehearsed when time is over; what is then left is missing.
    """
    if card:
        execution = execution.model_copy(update={"device": "cpu", "precision": "float32"})
    turns = [kind.run for turn in zip_longest(*stages.values()) for kind in turn if kind is not None]
    found: dict[str, Cost] = {}

    def note(entry: Entry) -> None:
        if isinstance(entry, _Rehearsed):
            found[entry.record.settings_hash] = entry.cost

    SCRATCH.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="plan-", dir=SCRATCH) as folder:
        execution = execution.model_copy(update={"engine": "local"})  # it is this machine that is measured
        store = _Rehearsal(Path(folder), execution, begun + MEASURING * seconds, card)
        try:
            execute(turns, store, execution, "rehearsal", note, TimeBudget(begun + seconds))
        except OutOfTime:
            pass
        except StageError as stopped:
            print(f"rehearsal: {stopped}", file=sys.stderr)
        finally:
            _restore()
    return found


# ------------------------------------------------------------------------------------------ one run


class _Rehearsed(Entry):
    """What a rehearsed run leaves, and what it would cost."""

    cost: Cost


class _Rehearsal(Store):
    """A store whose runs are rehearsed: a run begins when it asks for its checkpoints, and ends when it is saved."""

    def __init__(
        self, folder: Path, execution: ExecutionSettings, measure_until: float, card: Peaks | None = None
    ):
        super().__init__(folder, execution)
        self._measure_until, self._card = measure_until, card

    def checkpoints(self, run: Run, budget: TimeBudget | None = None) -> RunCheckpoints:
        _replace()
        _own.tally = _Tally(self._measure_until, self._card)
        with _own.tally.instead():
            # what each process does once, when it first gets there
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0).step()
        return super().checkpoints(run, budget)

    def save(self, run: Run, entry: Entry, state: Mapping[str, Any] | None) -> Entry:
        super().save(run, entry, state)
        tally, key = _own.tally, self.key(run)
        record, *others = (self.folder / f"{key}.{suffix}" for suffix in ("json", "pt"))
        kept = 2 * record.stat().st_size + sum(file.stat().st_size for file in others if file.exists())
        cost = Cost(
            seconds=tally.reckoned + (0.0 if self._card else entry.seconds - tally.spent),
            epochs=tally.epochs,
            disk=kept,
            from_macs=tally.from_macs,
            problem=entry.record.reason,
        )
        return _Rehearsed(**dict(entry), cost=cost)


@dataclass
class _Tally:
    """What the trainers of a run have spent on their rehearsal, and what they would spend on the real thing."""

    measure_until: float
    card: Peaks | None = None
    spent: float = 0.0
    reckoned: float = 0.0
    epochs: int = 0
    from_macs: bool = False

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Whatever happens here is part of the rehearsal and not of the run."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent += time.perf_counter() - begun


@dataclass(frozen=True)
class _Timing:
    """Seconds of an epoch or an evaluation, its MACs over all images, the hooks, and what it returned."""

    seconds: float
    macs: float
    hooks: tuple[type, ...]
    returned: dict[str, float]


# a worker process rehearses many runs; on a GPU, threads do
_own = threading.local()
_known: dict[tuple, _Timing] = {}
_layers: dict[tuple, list[counting.LayerCost]] = {}
_shapes: WeakKeyDictionary[BatchSource, torch.Size] = WeakKeyDictionary()
# by the labels of a split: how many images each one stands for
_stands_for = WeakTensorKeyDictionary()
_EPOCH, _EVALUATE, _DATASET = Trainer._epoch, Trainer.evaluate, Context.dataset


def _replace() -> None:
    """From here on, every trainer of this process is rehearsed, however a paper makes it."""
    _put(_rehearsed_epoch, _rehearsed_evaluate, _unreckoned_dataset)


def _restore() -> None:
    _put(_EPOCH, _EVALUATE, _DATASET)


def _put(
    epoch: Callable[[Trainer, Sequence[float]], dict[str, float]],
    evaluate: Callable[..., dict[str, float]],
    dataset: Callable[[Context, Any], Dataset],
) -> None:
    for owner, name, method in (
        (Trainer, "_epoch", epoch),
        (Trainer, "evaluate", evaluate),
        (Context, "dataset", dataset),
    ):
        setattr(owner, name, method)


def _unreckoned_dataset(context: Context, settings: Any) -> Dataset:
    # a process loads it once for all its runs
    with _own.tally.instead():
        data = _DATASET(context, settings)
        return _Sample.of(data) if _own.tally.card else data


class _Sample(Dataset):
    """Some of the images of a data set."""

    @classmethod
    def of(cls, data: Dataset) -> _Sample:
        """One in `SHARE` of each split, or `FEWEST`."""
        images, labels = {}, {}
        for split in SPLITS:
            count = len(data.labels[split])
            (kept,) = stratified(data.labels[split].numpy(), [min(count, max(FEWEST, count // SHARE))], 0)
            images[split], labels[split] = data.images[split][kept], data.labels[split][kept]
            _stands_for[labels[split]] = count / max(1, len(kept))
        as_it_is = {part.name: getattr(data, part.name) for part in fields(data)}
        return cls(**as_it_is | {"images": images, "labels": labels})

    def with_train_size(self, count: int, seed: int) -> Dataset:
        few = max(self.classes, round(count / _stands_for[self.labels["train"]]))
        chosen = super().with_train_size(min(few, len(self.labels["train"])), seed)
        _stands_for[chosen.labels["train"]] = count / len(chosen.labels["train"])
        return chosen


def _rehearsed_epoch(trainer: Trainer, learning_rates: Sequence[float]) -> dict[str, float]:
    first = trainer.iteration
    found = _timing(
        trainer,
        trainer.batches,
        "train",
        lambda: _time_epoch(trainer, learning_rates),
        lambda: _cut_epoch(trainer, _First(trainer.batches, 1, FEW), learning_rates[:1]),
    )
    _own.tally.epochs += 1
    trainer.iteration = first + len(learning_rates)
    return found | {"lr": learning_rates[-1]}


def _rehearsed_evaluate(
    trainer: Trainer, batches: BatchSource | None = None, _classes: list | None = None
) -> dict[str, float]:
    source = trainer.validation if batches is None else batches
    if source is None:
        raise ValueError("there are no batches to evaluate on")
    return _timing(
        trainer,
        source,
        "evaluate",
        lambda: _time_evaluation(trainer, source),
        lambda: _EVALUATE(trainer, _First(source, 1, FEW)),
    )


def _timing(
    trainer: Trainer,
    source: BatchSource,
    what: str,
    measure: Callable[[], tuple[float, dict[str, float]]],
    first: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Add the time of an epoch or an evaluation to the run's; returns what it would return.

    measure: gives the seconds here, and what is returned. first: what is returned after a few images.
    """
    tally = _own.tally
    with tally.instead():
        hooks = tuple(type(hook) for hook in trainer.hooks)
        shapes = tuple((*p.shape, p.requires_grad) for p in trainer.model.parameters())
        batch = _batch_shape(source)
        if (sizes := (shapes, batch[1:])) not in _layers:
            _layers[sizes] = counting.layer_costs(trainer.model, batch[1:])
        layers = _layers[sizes]
        key = (what, shapes, hooks, type(trainer.optimizer), len(source), batch, _images(source))
        alike = [timing for other, timing in _known.items() if other[0] == what]
        if key in _known:
            found = _known[key]
        else:
            macs = max(1, sum(layer.macs for layer in layers)) * batch[0] * len(source)
            if tally.card:
                share = 1.0 if what == "train" else FORWARD
                floor = share * training_seconds(layers, tally.card)
                found = _known[key] = _Timing(floor * _images(source), macs, hooks, first())
            elif alike and time.time() > tally.measure_until:
                nearest = min(alike, key=lambda t: (t.hooks != hooks, abs(math.log(t.macs / macs))))
                found = replace(nearest, seconds=nearest.seconds * macs / nearest.macs)
                tally.from_macs = True
            else:
                seconds, returned = measure()
                found = _known[key] = _Timing(seconds, macs, hooks, returned)
    tally.reckoned += found.seconds
    return dict(found.returned)


def _batch_shape(source: BatchSource) -> torch.Size:
    if source not in _shapes:
        _shapes[source] = next(iter(source.epoch(0)))[0].shape
    return _shapes[source]


def _images(source: BatchSource) -> float:
    """How many images an epoch of it stands for."""
    if isinstance(source, Batches):
        return len(source.labels) * _stands_for.get(source.labels, 1.0)
    return _batch_shape(source)[0] * len(source)


# ------------------------------------------------------------------------------------------ timing


@dataclass(eq=False)
class _First:
    """The first `count` batches of each epoch, cut to `images` images; `ready` is when the first one was there."""

    source: BatchSource
    count: int
    images: int | None = None
    ready: float = field(default=0.0, init=False)

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (images, labels) in enumerate(islice(self.source.epoch(number), self.count)):
            if not index:
                self.ready = time.perf_counter()
            yield images[: self.images], labels[: self.images]


def _now(trainer: Trainer) -> float:
    if trainer.compute.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()


def _cut_epoch(trainer: Trainer, batches: BatchSource, learning_rates: Sequence[float]) -> dict[str, float]:
    """The row of an epoch of other batches."""
    whole = trainer.batches
    trainer.batches = batches
    try:
        return _EPOCH(trainer, learning_rates)
    finally:
        trainer.batches = whole


def _time_epoch(trainer: Trainer, learning_rates: Sequence[float]) -> tuple[float, dict[str, float]]:
    """Seconds of the epoch that would begin now, and the row that its first iterations give."""
    whole, first, per_epoch = trainer.batches, trainer.iteration, len(learning_rates)
    planned = trainer.planned

    def timed(count: int) -> tuple[float, float, dict[str, float]]:
        """Seconds until the first batch (none where tables on the device give it), seconds of an iteration, row."""
        cut = _First(whole, count)
        trainer.iteration = first
        begun = _now(trainer)
        row = _cut_epoch(trainer, whole if planned else cut, learning_rates[:count])
        ready = begun if planned else cut.ready
        return ready - begun, (_now(trainer) - ready) / count, row

    # steps that are to be replayed on a GPU are captured after some others, one by one and several together
    timed(min(2 * MOST + 2 * WARM_UP if planned else 1, per_epoch))
    before, each, row = timed(min(2, per_epoch))
    if (enough := min(int(TIMED_SECONDS / each), per_epoch)) > 2:
        before, each, row = timed(enough)
    return before + each * per_epoch, row


def _time_evaluation(trainer: Trainer, source: BatchSource) -> tuple[float, dict[str, float]]:
    """Seconds of an evaluation on all batches of `source`, and the scores on the first."""
    size, *image = _batch_shape(source)
    timed = size
    if trainer.compute.device.type == "cpu":
        macs = sum(layer.macs for layer in counting.layer_costs(trainer.model, image))
        timed = min(size, max(1, int(EVALUATED_MACS / max(1, macs))))
    _EVALUATE(trainer, _First(source, 1, timed))
    part = _First(source, 1, timed)
    begun = _now(trainer)
    scores = _EVALUATE(trainer, part)
    done = _now(trainer)
    return part.ready - begun + (done - part.ready) * len(source) * size / timed, scores
