"""Made-up jobs: a test says what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from common.core.run import Cell, Context, Job, Outcome, Run
from common.settings import DatasetSettings

DATA = DatasetSettings(train=200, validation=100)


class MadeUp(Job):
    """Determined by its choices and by what it starts from; does what `does` says."""

    does: ClassVar[Callable[[Context], Outcome]]
    choices: dict[str, Any] = {}
    starts: tuple[Job, ...] = ()

    def execute(self, context: Context) -> Outcome:
        return type(self).does(context)


def made_up(
    variant: str = "dense",
    seed: int = 0,
    needs: tuple[Run, ...] = (),
    *,
    target: float = 0.0,
    data: DatasetSettings = DATA,
    **choices: Any,
) -> Run:
    """The run of a made-up job that starts from those of other runs."""
    starts = tuple(need.job for need in needs)
    cell = Cell(architecture="mlp", data=data)
    return MadeUp(variant=variant, cell=cell, target=target, seed=seed, choices=choices, starts=starts).run
