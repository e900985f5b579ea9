"""From measured parts to a step of ResNet-20 or ResNet-56 at batch 128: an estimate by counts, without anything else.

A block is conv1, batch norm, ReLU, conv2, batch norm, shortcut, ReLU. Its end needs a pass over memory forward (the
shortcut comes in), and each of its batch norms one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

BLOCKS = {"ResNet-20": 3, "ResNet-56": 9}  # a stage
# the stages' convolutions: the first of the stage where it differs, all others, and the channels' own passes
STAGES = [
    (None, "16->16 s1 @32"),
    ("16->32 s2 @32", "32->32 s1 @16"),
    ("32->64 s2 @16", "64->64 s1 @8"),
]
FIRST = {"cudnn": "3->16 s1 @32", "triton": "4->16 s1 @32"}
Row = Mapping[str, Any]


def estimates(cases: Sequence[Row]) -> dict[str, float]:
    """Microseconds a step of what has been measured, alone (`cycled`) and at 8 at once (`together`).

    cases: rows as measure.Kit writes them. What lacks a part is left out.
    """
    found = {}
    for network, blocks in BLOCKS.items():
        for how in ("cycled", "together"):
            step = _Step(cases, blocks, how)
            wanted: dict[str, Callable[[], float]] = {by: partial(step.convolutions, by) for by in FIRST}
            for finish in ("unfolded", "folded", "apart"):
                for where in ("kernel", "pass"):
                    name = f"triton with batch norm, sums {finish}, norm in a {where}"
                    wanted[name] = partial(step.with_norm, finish, where == "kernel")
            for name, part in wanted.items():
                try:
                    found[f"{network}, {name}, {how}"] = round(part(), 1)
                except KeyError:
                    continue
    return found


class _Step:
    def __init__(self, cases: Sequence[Row], blocks: int, how: str) -> None:
        self.blocks = blocks
        self.times = {(r["case"], r["kind"], r["by"], r.get("fused", "plain")): r[how] for r in cases}

    def _at(self, case: str, kind: str, fused: str = "plain", by: str = "triton") -> float:
        return self.times[case, kind, by, fused]

    def _pass(self, case: str, name: str) -> float:
        """A pass that has not been measured takes at most as long as this one, which reads no less."""
        return self.times.get((case, name, "triton", "plain"), self._at(case, "through norm"))

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for first, other in STAGES:
            if first:
                counts[first] = 1
            counts[other] = 2 * self.blocks - (first is not None)
        return counts

    def convolutions(self, by: str) -> float:
        """All convolutions, without batch norm."""
        total = sum(self._at(FIRST[by], kind, by=by) for kind in ("forward", "wgrad"))
        for case, count in self._counts().items():
            total += count * sum(self._at(case, kind, by=by) for kind in ("forward", "dgrad", "wgrad"))
        return total

    def with_norm(self, finish: str, in_kernel: bool) -> float:
        """Convolutions with batch norm's sums in them, and the passes that are left.

        in_kernel: conv2 and its gradient of the weights normalise their input as they load it; else a pass does.
        """
        sums, behind = f"sums, {finish}", f"behind norm, {finish}"
        total = self._at(FIRST["triton"], "forward", sums) + self._at(FIRST["triton"], "wgrad")
        for case, count in self._counts().items():
            total += count * (self._at(case, "forward", sums) + self._at(case, "wgrad"))
            total += count * self._at(case, "dgrad", behind)
        for _, case in STAGES:
            each = self._pass(case, "normalise, add") + 2 * self._pass(case, "through norm")
            if in_kernel:
                each += self._at(case, "forward", f"norm, sums, {finish}") - self._at(case, "forward", sums)
                each += self._at(case, "wgrad", "norm") - self._at(case, "wgrad")
            else:
                each += self._pass(case, "normalise")
            total += self.blocks * each
        return total
