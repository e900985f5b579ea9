"""Which runs test the claims of the IMP paper.

One dense network per seed is shared by everything that prunes after training. Methods that prune during
training start from the same initial weights and train for as many epochs as dense training and retraining
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from common.core.models import build
from common.core.pruning.masks import Infeasible, layer_counts, prunable
from common.core.run import Run
from common.settings import DatasetSettings, Profile, SettingsError
from replications.imp_slr import method
from replications.imp_slr.execution import execute
from replications.imp_slr.settings import (
    RETRAINED,
    UNTARGETED,
    Cell,
    DenseSchedule,
    During,
    Settings,
    percent,
)

__all__ = ["Settings", "execute", "runs"]

PAPER = "imp_slr"
# criteria, lengths and cycles are all compared under this schedule
BASE: method.Schedule = "SLR"


def runs(profile: Profile) -> list[Run]:
    """All runs of the profile. Raises SettingsError for a network or an allocation that cannot be."""
    listed = []
    for number, cell in enumerate(profile.paper.cells):
        where = f"{PAPER}.cells[{number}]"
        settings = profile.paper.changed(cell.settings, f"{where}.settings")
        data = cell.data or profile.dataset
        _check(cell, settings, data, where)
        cell_runs = _CellRuns(cell, settings, data)
        for seed in settings.seeds:
            for experiment in cell.experiments:
                listed += getattr(cell_runs, experiment)(seed)
    return listed


# image shapes of the sources that have only one; the number of classes does not matter for a check
_SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "svhn": (3, 32, 32),
}


def _check(cell: Cell, settings: Settings, data: DatasetSettings, where: str) -> None:
    """Raise SettingsError if the network cannot be built or an allocation cannot reach a target in it."""
    shape = _SHAPES.get(data.source, (3, *[data.size or 64] * 2))
    options = {"widths": cell.widths, "device": "meta", **cell.options}
    try:
        model = build(cell.architecture, classes=10, image_shape=shape, **options)
        if "allocations" in cell.experiments:
            for target in settings.targets:
                for allocation in settings.allocations:
                    if allocation in ("ERK", "uniform_plus"):
                        shapes = [weight.shape for weight in prunable(model).values()]
                        layer_counts(shapes, [shape.numel() for shape in shapes], target, allocation)
    except (SettingsError, ValueError, TypeError, Infeasible) as error:
        raise SettingsError(f"{where} ({cell.architecture}): {error}") from None


class _CellRuns:
    """The runs of one network. Runs that several experiments need are the same run each time."""

    def __init__(self, cell: Cell, settings: Settings, data: DatasetSettings):
        self.cell, self.settings, self.data = cell, settings, data
        self.rates = list(cell.learning_rates or settings.learning_rates)
        self._dense_tuning: list[Run] | None = None
        self._denses: dict[int, Run] = {}

    def schedules(self, seed: int) -> list[Run]:
        """H1: retraining schedules at the same length."""
        length = self.settings.retrain_epochs
        found = [
            self._length(seed, t, kind, length)
            for t in self.settings.targets
            for kind in self.settings.schedules
        ]
        for tuned in self.settings.tunables:
            name = f"{tuned.kind}-{tuned.initial:g}-{tuned.warmup_share:g}"
            found += [
                self._imp(
                    seed, target, name, tuned.kind, initial=tuned.initial, warmup_share=tuned.warmup_share
                )
                for target in self.settings.targets
            ]
        return found

    def during(self, seed: int) -> list[Run]:
        """H2: methods that prune during training, at equal total epochs."""
        found = [self._imp(seed, target, BASE.lower(), BASE) for target in self.settings.targets]
        for name in self.settings.during:
            if name in UNTARGETED:
                found += self._swept(seed, name)
            else:
                found += [self._trained(seed, target, name) for target in self.settings.targets]
        return found

    def allocations(self, seed: int) -> list[Run]:
        """H3: global ranking against allocations by layer."""
        found = [self._imp(seed, target, BASE.lower(), BASE) for target in self.settings.targets]
        for name in self.settings.allocations:
            variant = f"{BASE.lower()}-{name.lower()}"
            found += [self._imp(seed, t, variant, BASE, allocation=name) for t in self.settings.targets]
        return found

    def lengths(self, seed: int) -> list[Run]:
        """H4: lengths of retraining. The longest reports which share of its gain the others reach."""
        found = []
        for target in self.settings.targets:
            lengths = sorted([*self.settings.lengths, self.settings.retrain_epochs])
            shorter = [self._length(seed, target, BASE, length) for length in lengths[:-1]]
            found += [*shorter, self._length(seed, target, BASE, lengths[-1], tuple(shorter))]
        return found

    def cycles(self, seed: int) -> list[Run]:
        """H5: several cycles against one."""
        found = []
        for target in self.settings.targets:
            found.append(self._imp(seed, target, BASE.lower(), BASE))
            for count in self.settings.cycles:
                number = method.cycles_needed(target) if count == "20%" else count
                name = f"{BASE.lower()}-{'20pct-' if count == '20%' else count}cycles"
                found.append(self._imp(seed, target, name, BASE, cycles=number))
        return found

    def short(self, seed: int) -> list[Run]:
        """H6: schedules for short retraining."""
        return [
            self._length(seed, target, kind, length)
            for target in self.settings.targets
            for kind in self.settings.short_schedules
            for length in self.settings.short_lengths
        ]

    def bimp(self, seed: int) -> list[Run]:
        """H7: budgeted IMP, which takes as many epochs in all as the methods that prune during training."""
        settings, found = self.settings, []
        for share in settings.bimp.shares:
            epochs = round(share * settings.total_epochs)
            name = f"bimp-{percent(share, 1)}"
            schedule = {"schedule": DenseSchedule(kind="linear").model_dump(mode="json"), "epochs": epochs}
            for target in settings.targets:
                if settings.bimp.reading == "2022":
                    more = {"total": settings.total_epochs, "interval": settings.bimp.interval}
                    found.append(
                        self._run(seed, target, name, "bimp2022", self._tuned_by_imp(), **schedule, **more)
                    )
                    continue
                dense = self._run(seed, 0.0, f"{name}-dense", "dense", self._tuned_by_imp(), **schedule)
                left = settings.total_epochs - epochs
                found.append(
                    self._imp(
                        seed, target, name, "ALLR", dense=dense, epochs=left, cycles=settings.bimp.cycles
                    )
                )
        return found

    # -------------------------------------------------------------------------------------- single runs

    def _run(
        self, seed: int, target: float, variant: str, step: str, needs: Sequence[Run], **more: Any
    ) -> Run:
        settings = self.settings
        held = {
            "step": step,
            "data": self.data.model_dump(mode="json"),
            "widths": self.cell.widths,
            "options": self.cell.options,
            **settings.model_dump(
                mode="json", include={"batch_size", "momentum", "nesterov", "weight_decay"}
            ),
            "schedule": settings.schedule.model_dump(mode="json"),
            "epochs": settings.epochs,
            "learning_rates": self.rates,
            **more,
        }
        named = (PAPER, variant, self.data.name, self.cell.architecture, target, seed)
        return Run(*named, held, tuple(needs))

    def _dense(self, seed: int) -> Run:
        if seed not in self._denses:
            self._denses[seed] = self._run(seed, 0.0, "dense", "dense", self._tuned_by_imp())
        return self._denses[seed]

    def _imp(
        self,
        seed: int,
        target: float,
        variant: str,
        kind: str,
        *,
        dense: Run | None = None,
        epochs: int | None = None,
        cycles: int = 1,
        needs: Sequence[Run] = (),
        **more: Any,
    ) -> Run:
        dense = dense or self._dense(seed)
        more = {"kind": kind, "cycles": cycles, "allocation": "global", **more}
        more |= {"retrain_epochs": epochs or self.settings.retrain_epochs}
        more |= {"retraining": self.settings.retraining.model_dump(mode="json")}
        return self._run(seed, target, variant, "imp", (dense, *needs), **more)

    def _length(self, seed: int, target: float, kind: str, length: int, shorter: tuple[Run, ...] = ()) -> Run:
        # LC is a schedule as well as a method that prunes during training
        name = kind.lower() if kind.lower() not in get_args(During) else f"{kind.lower()}-schedule"
        if length != self.settings.retrain_epochs:
            name += f"-{percent(length, self.settings.epochs)}"
        return self._imp(seed, target, name, kind, epochs=length, needs=shorter)

    def _trained(
        self, seed: int, target: float, name: str, needs: Sequence[Run] | None = None, **more: Any
    ) -> Run:
        """A run of a method that prunes during training; needs: its tuning runs, unless given."""
        options = getattr(self.settings, name).model_dump(mode="json") if hasattr(self.settings, name) else {}
        more = {"method": name, "method_options": options, **more}
        more |= {"epochs": self.settings.total_epochs}
        if name in RETRAINED:
            more |= {
                "epochs": self.settings.epochs,
                "kind": BASE,
                "retrain_epochs": self.settings.retrain_epochs,
            }
            more |= {"retraining": self.settings.retraining.model_dump(mode="json")}
        variant = more.pop("variant", name)
        return self._run(
            seed, target, variant, "during", self._tuning(name, target) if needs is None else needs, **more
        )

    def _swept(self, seed: int, name: str) -> list[Run]:
        """A method without a target at each of its swept values, and IMP at the sparsity that it reached."""
        swept = {"str": "weight_decays", "cs": "initials", "dst": "penalties"}[name]
        found = []
        for value in getattr(getattr(self.settings, name), swept):
            run = self._trained(
                seed, 0.0, name, self._tuned_by_imp(), variant=f"{name}-{value:g}", swept=value
            )
            found += [
                run,
                self._imp(seed, 0.0, f"{BASE.lower()}-as-{name}-{value:g}", BASE, needs=[run], matched=True),
            ]
        return found

    def _tuned_by_imp(self) -> list[Run]:
        """Runs from which the learning rate of dense training is chosen; none if there is no choice."""
        if self._dense_tuning is None:
            self._dense_tuning = []
            for seed, rate, label in self._trials("imp"):
                dense = self._run(
                    seed, 0.0, f"{label}-dense", "dense", (), learning_rates=[rate], tuning=True
                )
                self._dense_tuning += [
                    self._imp(seed, target, label, BASE, dense=dense, tuning=True)
                    for target in self.settings.targets
                ]
        return self._dense_tuning

    def _tuning(self, name: str, target: float) -> list[Run]:
        """The same for a method that prunes during training."""
        return [
            self._trained(seed, target, name, (), variant=label, learning_rates=[rate], tuning=True)
            for seed, rate, label in self._trials(name)
        ]

    def _trials(self, name: str) -> list[tuple[int, float, str]]:
        """Seed, learning rate and name of each tuning run; none if there is nothing to choose from."""
        if len(self.rates) == 1:
            return []
        return [(seed, r, f"tuning-{name}-{r:g}") for r in self.rates for seed in self.settings.tuning_seeds]
