"""Tuning: of a few settings the one with the best validation accuracy, tried with as many trainings for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, Literal, Self, TypeVar

from pydantic import model_validator

from common.core.failures import Diverged
from common.core.recipe import Recipe
from common.core.run import Context, Job, Outcome
from common.records import TRIAL, Record
from common.settings import PaperSettings, Seeds, parts

Option = TypeVar("Option")


class TuningSettings(PaperSettings):
    """Base of the settings of a paper that tunes."""

    tuning: Literal["shared", "per_seed"] = "shared"
    """`shared`: once for all seeds, with seeds of its own; `per_seed`: with each seed for itself."""
    tuning_seeds: Seeds = (1000,)
    """Of `shared`."""

    @model_validator(mode="after")
    def _seeds_of_its_own(self) -> Self:
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("seeds and tuning_seeds must have no seed in common")
        return self


@dataclass(frozen=True)
class Tuned(Generic[Option]):
    """A setting that is chosen from `options`. trials: of each option, as many; none where there is one option."""

    options: tuple[Option, ...]
    trials: tuple[tuple[Job, ...], ...] = ()

    def chosen(self, context: Context) -> Option:
        """The option with the best mean validation accuracy, of equal ones the first.

        An option of which a trial is lost loses to all others. Raises Diverged where all are.
        """
        if not self.trials:
            (only,) = self.options
            return only
        means = self.means(context)
        if not (left := [mean for mean in means if mean is not None]):
            records = [[context.of(job).record for job in jobs] for jobs in self.trials]
            reasons = [next(r.reason for r in found if r.status == "failed") for found in records]
            raise Diverged(f"all trials of {context.run.variant} are lost: {'; '.join(map(str, reasons))}")
        return self.options[means.index(max(left))]

    def means(self, context: Context) -> list[float | None]:
        """The mean validation accuracy of each option's trials, None where one is lost."""
        records = [[context.of(job).record for job in jobs] for jobs in self.trials]
        return [
            fmean(record.metrics["validation_accuracy"] for record in found)
            if all(record.status == "ok" for record in found)
            else None
            for found in records
        ]


class Chosen(Job):
    """The best of a variant's trials, as it is: nothing is trained again.

    choice: from runs at this one's target, each of which left its network; they may be tried at other targets as well.
    training: of the networks; only its batch size and the like play a role.
    """

    choice: Tuned[Job]
    training: Recipe

    def execute(self, context: Context) -> Outcome:
        best = context.of(self.choice.chosen(context))
        model = context.network()
        model.load_state_dict(best.state["model"])
        outcome = context.measured(self.training.trainer(context, model))
        outcome.metrics = {**best.record.metrics, **outcome.metrics}
        outcome.details |= best.record.details
        outcome.curves = best.curves
        return outcome


def tuned(
    settings: TuningSettings,
    seed: int,
    name: str,
    options: Sequence[Option],
    trial: Callable[[str, Option, int], Job | tuple[Job, ...]],
) -> Tuned[Option]:
    """What the variant `name` chooses from `options` in its run of `seed`.

    trial: makes the job that tries an option, of a name and a seed, or several jobs.
    """
    if len(options) == 1:
        return Tuned(tuple(options))
    seeds = settings.tuning_seeds if settings.tuning == "shared" else (seed,)
    trials = (
        tuple(job for own in seeds for job in parts(trial(f"{TRIAL}{name}-{number}", option, own), Job))
        for number, option in enumerate(options)
    )
    return Tuned(tuple(options), tuple(trials))


def lost(job: Job, need: Job, record: Record) -> bool:
    """Whether a needed run that failed is a trial which lost by that, so that `job` goes on with the others."""
    trials = (trial for _, choice in job.parts(Tuned) for trial in parts(choice.trials, Job))
    return record.is_lost_trial and any(trial.run.settings_hash == need.run.settings_hash for trial in trials)
