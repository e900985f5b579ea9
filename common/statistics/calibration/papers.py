"""Makes papers: records and claims as real ones have them, with accuracies that are drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.records import Record
from common.statistics.calibration.cells import CHANCE, DENSE, EQUAL, FAR, LEVEL, UNEQUAL, Cell
from common.statistics.claims import Claim
from common.statistics.records import Records

_PLACE = {"paper": "made-up", "dataset": "made-up", "architecture": "none"}
_POINTS = 3  # targets of a trend


class Papers:
    """Makes the papers of a cell: the claims, and records that differ in their accuracies alone."""

    def __init__(self, cell: Cell):
        self.cell, self.outcome = cell, {**EQUAL, **UNEQUAL}[cell.outcome]
        trend = cell.question.test == "trend"
        self.points = _POINTS if trend else cell.family.comparisons
        self.targets = tuple(np.round(np.arange(1, self.points + 1) / 10, 1).tolist())
        self.claims = tuple(self._claim(number) for number in range(cell.family.claims))
        self.dense = [self._record("dense", 0.0, seed, DENSE) for seed in range(cell.design.seeds)]
        arms = range(cell.family.claims), self.targets, range(cell.design.seeds)
        self.runs = [
            [
                self._record(f"{side} {claim}", target, seed, LEVEL)
                for claim, target, seed in itertools.product(*arms)
            ]
            for side in ("treatment", "control")
        ]
        treatment = np.repeat(self.truth(), cell.design.seeds).tolist()
        self.shifts = treatment, [0.0] * len(treatment)

    def _claim(self, number: int) -> Claim:
        question, margin = self.cell.question, self.outcome.margin
        fields: dict[str, Any] = {"id": f"C{number}", "statement": "made up", "test": question.test}
        fields |= {side: {"variant": f"{side} {number}"} for side in ("treatment", "control")}
        fields |= {"targets": self.targets, "require": self.cell.family.require}
        if question.test not in ("equivalence", "difference"):
            fields["direction"] = "higher"
        if question.matters:
            fields["matters"] = margin
        if question.test == "threshold":
            fields["value"] = margin
        return Claim(**fields)

    @staticmethod
    def _record(variant: str, target: float, seed: int, accuracy: float) -> Record:
        return Record(
            variant=variant,
            **_PLACE,
            target=target,
            seed=seed,
            status="ok",
            metrics={"test_accuracy": accuracy},
            cost={"compression": 1 / (1 - target)},
            chance=CHANCE,
        )

    def truth(self) -> np.ndarray:
        """What is added to the treatment's accuracies, [claims, points, 1]."""
        question, margin = self.cell.question, self.outcome.margin
        found = np.full((self.cell.family.claims, self.points, 1), question.truth * margin)
        if question.test == "trend":
            # the slope's standard deviation is that of a difference over the root of the targets' sum of squares
            centred = np.array(self.targets) - np.mean(self.targets)
            return found * (centred / math.sqrt(centred @ centred))[:, None]
        away = {"null": 0.0, "above": FAR, "below": -FAR}[self.cell.family.others] * margin
        found.reshape(-1)[1:] += away
        return found

    def draw(self, random: np.random.Generator, papers: int) -> Iterator[Records]:
        """The records of one paper after the other."""
        shape = (papers, self.cell.family.claims, self.points, self.cell.design.seeds)
        treatment, control = self.outcome.draw(random, shape)
        treatment = treatment + self.truth()
        if self.outcome.decimals is not None:
            treatment, control = (np.round(side, self.outcome.decimals) for side in (treatment, control))
        sides = [side.reshape(papers, -1).tolist() for side in (treatment, control)]
        for accuracies in zip(*sides, strict=True):
            records = [
                self._with(*run)
                for side in zip(self.runs, accuracies, self.shifts, strict=True)
                for run in zip(*side, strict=True)
            ]
            yield Records(self.dense + records)

    @staticmethod
    def _with(run: Record, accuracy: float, shift: float) -> Record:
        if math.isnan(accuracy):
            # all outcomes of an arm are shifted, or both would not be distributed alike
            failed = {"status": "failed", "failure": "diverged", "reason": "the loss is nan"}
            return run.model_copy(update={**failed, "metrics": {}, "cost": {}, "chance": CHANCE + shift})
        return run.model_copy(update={"metrics": {"test_accuracy": accuracy}})
