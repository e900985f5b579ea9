"""Interleaved timing, ratios of paired rounds with intervals, and growth."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Clock = Literal["wall", "cpu"]
Kind = Literal["throughput", "speed", "share", "overhead", "cost", "memory", "growth"]
"""What a finding's number is: images/s, times as fast, share of an ideal, time (`overhead`: of an addition, near 1) or
bytes relative to something, or the exponent of growth."""

_RESAMPLES = 2000


def seconds() -> tuple[float, float]:
    """Wall time, and CPU time of this process with all its threads and the processes it has started."""
    import psutil  # the part that measures a GPU does without

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        children += times.user + times.system
    return time.perf_counter(), time.process_time() + children


@dataclass(frozen=True)
class Measured:
    """Seconds that each side took in each round: side -> [rounds], rounds paired by their position.

    images: that one round of each side processes; None where sides differ in it.
    """

    images: int | None
    wall: dict[str, np.ndarray]
    cpu: dict[str, np.ndarray]

    def sides(self) -> dict[str, dict[str, Any]]:
        """Median and quartiles of both clocks by side, in seconds, and images/s by the wall clock."""
        found = {
            side: {"wall_seconds": _spread(self.wall[side]), "cpu_seconds": _spread(self.cpu[side])}
            for side in self.wall
        }
        if self.images:
            for side, row in found.items():
                row["images_per_second"] = round(self.images / float(np.median(self.wall[side])), 1)
        return found

    def ratios(self, of: str, over: str, clock: Clock) -> np.ndarray:
        """Seconds of one side over those of another, round by round."""
        times = getattr(self, clock)
        return times[of] / times[over]


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "lower_quartile": float(low), "upper_quartile": float(high)}


def measure(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    images: int | None = None,
    warm_ups: int = 1,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], tuple[float, float]] = seconds,
) -> Measured:
    """Run every side once in each round, every other round in reverse order, so that drift hits all alike.

    sides: by name, each does the same work at every call. images: that a call of any side
    processes. warm_ups: calls of each side
    before the first round. synchronise: waits for the device. clock: wall and CPU seconds.
    """
    for side in sides.values():
        for _ in range(warm_ups):
            side()
    taken: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            synchronise()
            begun = np.array(clock())
            sides[name]()
            synchronise()
            taken[name].append(np.array(clock()) - begun)
    wall, cpu = ({name: np.array(pairs)[:, i] for name, pairs in taken.items()} for i in (0, 1))
    return Measured(images, wall, cpu)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the median, with a fixed random seed."""
    values = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Finding:
    """A number with its interval and, where there is one, the goal that it is to keep."""

    label: str
    kind: Kind
    value: float
    interval: tuple[float, float]
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def of(cls, label: str, kind: Kind, values: Sequence[float] | np.ndarray, **goal: float) -> Finding:
        """From one value a round: their median and its interval. goal: at_least or at_most."""
        return cls(label, kind, float(np.median(values)), interval(values), **goal)

    @property
    def met(self) -> bool | None:
        """Whether the whole interval keeps the goal; None without a goal, or when the interval holds it."""
        low, high = self.interval
        if self.at_least is not None:
            return True if low >= self.at_least else False if high < self.at_least else None
        if self.at_most is not None:
            return True if high <= self.at_most else False if low > self.at_most else None
        return None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "interval": list(self.interval), "met": self.met}


@dataclass(frozen=True)
class Growth:
    """How seconds grow with a size.

    exponents: of the power law through all sizes, one a round. slope, intercept: of the straight line through the
    median seconds.
    """

    exponents: np.ndarray
    slope: float
    intercept: float

    @classmethod
    def fit(cls, sizes: Sequence[float], times: Sequence[np.ndarray]) -> Growth:
        """sizes: at least two, positive. times: seconds [rounds] of each size."""
        logs = np.log(np.stack(times))
        exponents = np.polyfit(np.log(sizes), logs, 1)[0]
        slope, intercept = np.polyfit(sizes, [float(np.median(t)) for t in times], 1)
        return cls(exponents, float(slope), float(intercept))
