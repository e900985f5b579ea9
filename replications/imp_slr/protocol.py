"""Which runs test the claims of the IMP paper, and how one run is executed.

One dense network per seed is shared by everything that prunes after training. Methods that prune during training start
from the same initial weights and train for as many epochs as dense training and retraining together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import nn

from common import schedules
from common.datasets import Batches, Dataset
from common.models import architecture, build
from common.pruning.counting import cost
from common.pruning.masks import Allocation, KeepMasked, Masks, prunable, squared_norm
from common.runs import EVALUATION_BATCH, Context, Outcome, Run
from common.settings import Count, PaperSettings, Profile, Rate, Seeds, Share, Strict, Targets, stream
from common.training import Diverged, Hooks, RunFailed, Trainer
from replications.imp_slr import baselines, method

PAPER = "imp_slr"
# criteria, lengths and cycles are all compared under this schedule
BASE: method.Schedule = "SLR"

Experiment = Literal["schedules", "during", "allocations", "lengths", "cycles", "short", "bimp"]
During = Literal["gmp", "dpf", "gsm", "lc", "dnw", "str", "cs", "dst"]
# these aim at no sparsity: they are swept, and IMP is run at the sparsity that they reach
UNTARGETED = ("str", "cs", "dst")
# these end in an ordinary prune-and-retrain
RETRAINED = ("gsm", "lc")

NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Cell(Strict):
    """A network, and the experiments that are made with it."""

    architecture: str = "mlp"
    widths: tuple[Count, ...] | None = None
    options: dict[str, Any] = {}
    """Further options of the network's class, such as `shortcut` of a ResNet."""
    experiments: Annotated[tuple[Experiment, ...], Field(min_length=1)] = get_args(Experiment)
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] | None = None
    """In place of the paper's grid; a single one is not tuned."""


class DenseSchedule(Strict):
    """Learning rates of training from scratch; the highest one is tuned."""

    kind: Literal["multistep", "step", "exponential", "linear", "cosine", "constant"] = "multistep"
    milestones: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 0.75)
    """Of `multistep`, as shares of the epochs."""
    every: Share = 0.25
    """Of `step`: share of the epochs between two drops."""
    gamma: Share = 0.1
    """Factor of a drop; of `exponential`, per iteration."""
    end: NotNegative = 0.0
    """Last value of `linear` and `cosine`."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0

    def rates(self, rate: float, epochs: int, per_epoch: int) -> list[float]:
        """One number per iteration."""
        shape = {"epochs": epochs, "per_epoch": per_epoch, "warmup_epochs": self.warmup_epochs}
        if self.kind == "multistep":
            milestones = [share * epochs for share in self.milestones]
            return schedules.multistep(rate, milestones=milestones, gamma=self.gamma, **shape)
        if self.kind == "step":
            return schedules.step(rate, step_epochs=max(1, round(self.every * epochs)), gamma=self.gamma, **shape)
        if self.kind == "exponential":
            return schedules.exponential(rate, gamma=self.gamma, **shape)
        if self.kind == "constant":
            return schedules.constant(rate, **shape)
        return getattr(schedules, self.kind)(rate, end=self.end, **shape)


class Tuned(Strict):
    """A tunable retraining schedule of the ablation."""

    kind: method.Tunable
    initial: Rate
    warmup_share: Fraction = method.WARMUP_SHARE


class Retraining(Strict):
    """What all retraining has in common."""

    cycle_epochs: Literal["split", "each"] = "split"
    """Whether several cycles share the epochs, or each has as many."""
    reset_momentum: bool = False
    """Forget the momentum at each pruning."""
    recalibrate: bool = True
    """Renew batch-norm statistics after each pruning."""
    adaptive: Literal["2023", "2022"] = "2023"
    """Start of ALLR: by the formula in every cycle, or in the last one only and the full rate before."""


class GMPSettings(Strict):
    interval: Count = 1
    """Epochs between prunings."""
    recovering: bool = False
    """Whether pruned weights may come back."""
    allocation: Allocation = "global"


class DPFSettings(Strict):
    interval: Count = 1
    """Epochs between changes of the target."""


class GSMSettings(Strict):
    momentum: Momentum = 0.99
    rank_over: baselines.Ranking = "all"


class LCSettings(Strict):
    weight_decay: NotNegative = 5e-3
    rank_over: baselines.Ranking = "all"
    growing: bool = False
    """Let the weight decay grow as in the 2022 code."""


class STRSettings(Strict):
    initial: float = -5.0
    """Every layer's threshold is sigmoid of a learnt number that starts here."""
    weight_decays: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (1e-3, 3e-3)
    """Swept: they drive the sparsity."""


class CSSettings(Strict):
    initials: Annotated[tuple[float, ...], Field(min_length=1)] = (-0.1, 0.0)
    """Swept: first value of the gates."""
    beta_final: Annotated[float, Field(ge=1)] = 200.0
    penalty: NotNegative = 1e-5
    double_decay: bool = False


class DSTSettings(Strict):
    penalties: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (1e-3, 1e-2)
    """Swept: they drive the sparsity."""
    double_decay: bool = False


class BIMPSettings(Strict):
    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.5, 0.7, 0.9)
    """Of the total epochs, for dense training with a linear schedule."""
    cycles: Count = 1
    reading: Literal["2023", "2022"] = "2023"
    """Dense training followed by IMP with ALLR, or one run with prunings every `interval` epochs."""
    interval: Count = 4


class Settings(PaperSettings):
    cells: Annotated[tuple[Cell, ...], Field(min_length=1)] = (
        Cell(experiments=tuple(name for name in get_args(Experiment) if name != "allocations")),
        Cell(architecture="digits_cnn_strided", experiments=("allocations",), learning_rates=(0.1,)),
    )
    targets: Targets = (0.9, 0.95, 0.98)
    epochs: Count = 30
    """Of dense training."""
    retrain_epochs: Count = 9
    """Of retraining; methods that prune during training have these on top of `epochs`."""
    batch_size: Count = 64
    momentum: Momentum = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4
    schedule: DenseSchedule = DenseSchedule()
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.03, 0.1, 0.3)
    """Grid; a method's rate is the one with the best mean validation accuracy over the tuning seeds.

    A method that prunes during training has a rate for each target, dense training one for all targets.
    """
    tuning_seeds: Seeds = (1000, 1001)
    schedules: tuple[method.Schedule, ...] = ("SLR", "FT", "LRW", "ALLR")
    tunables: tuple[Tuned, ...] = ()
    during: tuple[During, ...] = ("gmp", "dpf")
    allocations: tuple[Allocation, ...] = ("uniform", "uniform_plus", "ERK", "LAMP")
    """Compared with global."""
    lengths: tuple[Count, ...] = (1, 3, 6, 18, 30)
    """Epochs of retraining, beside `retrain_epochs`."""
    cycles: tuple[Annotated[int, Field(ge=2)] | Literal["20%"], ...] = (3,)
    """Compared with one; `20%` takes as many as it needs to prune that share in each."""
    short_schedules: tuple[method.Schedule, ...] = ("SLR", "LLR", "ALLR")
    short_lengths: tuple[Count, ...] = (1, 3)
    retraining: Retraining = Retraining()
    gmp: GMPSettings = GMPSettings()
    dpf: DPFSettings = DPFSettings()
    gsm: GSMSettings = GSMSettings()
    lc: LCSettings = LCSettings()
    str: STRSettings = STRSettings()
    cs: CSSettings = CSSettings()
    dst: DSTSettings = DSTSettings()
    bimp: BIMPSettings = BIMPSettings()

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.retrain_epochs

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("seeds and tuning_seeds must have no seed in common")
        if not all(0 < target for target in self.targets):
            raise ValueError("targets must be above 0")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be fewer than the {self.epochs} epochs")
        for name in ("lengths", "short_lengths"):
            lengths = getattr(self, name)
            if self.retrain_epochs in lengths:
                raise ValueError(f"{name} must leave out retrain_epochs = {self.retrain_epochs}, which always runs")
            if len({_percent(length, self.epochs) for length in lengths}) < len(lengths):
                raise ValueError(f"{name} must differ by at least a percent of the {self.epochs} epochs")
        rewound = [self.retrain_epochs] * ("LRW" in self.schedules)
        rewound += [length for length in self.short_lengths if "LRW" in self.short_schedules]
        if any(length > self.epochs for length in rewound):
            raise ValueError(f"LRW can retrain for no more than the {self.epochs} epochs of dense training")
        for name in ("gmp", "dpf"):
            if name in self.during and self.total_epochs // getattr(self, name).interval < 2:
                raise ValueError(f"{name}.interval must fit twice into the {self.total_epochs} epochs")
        dense = [round(share * self.total_epochs) for share in self.bimp.shares]
        if not all(0 < epochs < self.total_epochs for epochs in dense):
            raise ValueError(f"bimp.shares must leave some of the {self.total_epochs} epochs on either side")
        if len({_percent(share, 1) for share in self.bimp.shares}) < len(dense):
            raise ValueError("bimp.shares must differ by at least a percent")
        if self.bimp.reading == "2022" and self.total_epochs - max(dense) < self.bimp.interval:
            raise ValueError("bimp.interval must fit into the epochs after dense training")
        return self


def _percent(part: float, whole: float) -> str:
    return f"{round(100 * part / whole)}pct"


# ------------------------------------------------------------------------------------------ which runs


def runs(profile: Profile) -> list[Run]:
    """All runs of the profile. Raises SettingsError for an unknown architecture."""
    listed = []
    for cell in profile.paper.cells:
        architecture(cell.architecture)
        plan = _Plan(profile, cell)
        for seed in profile.paper.seeds:
            for experiment in cell.experiments:
                listed += getattr(plan, experiment)(seed)
    return listed


class _Plan:
    """The runs of one network. Runs that several experiments need are the same run each time."""

    def __init__(self, profile: Profile, cell: Cell):
        self.profile, self.cell, self.settings = profile, cell, profile.paper
        self.rates = list(cell.learning_rates or profile.paper.learning_rates)
        self._dense_tuning: list[Run] | None = None
        self._denses: dict[int, Run] = {}

    def schedules(self, seed: int) -> list[Run]:
        """H1: retraining schedules at the same length."""
        length = self.settings.retrain_epochs
        found = [self._length(seed, t, kind, length) for t in self.settings.targets for kind in self.settings.schedules]
        for tuned in self.settings.tunables:
            name = f"{tuned.kind}-{tuned.initial:g}-{tuned.warmup_share:g}"
            more = {"initial": tuned.initial, "warmup_share": tuned.warmup_share}
            found += [self._imp(seed, target, name, tuned.kind, **more) for target in self.settings.targets]
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
            name = f"bimp-{_percent(share, 1)}"
            schedule = {"schedule": DenseSchedule(kind="linear").model_dump(mode="json"), "epochs": epochs}
            for target in settings.targets:
                if settings.bimp.reading == "2022":
                    more = {"total": settings.total_epochs, "interval": settings.bimp.interval}
                    found.append(self._run(seed, target, name, "bimp2022", self._tuned_by_imp(), **schedule, **more))
                    continue
                dense = self._run(seed, 0.0, f"{name}-dense", "dense", self._tuned_by_imp(), **schedule)
                left = settings.total_epochs - epochs
                found.append(
                    self._imp(seed, target, name, "ALLR", dense=dense, epochs=left, cycles=settings.bimp.cycles)
                )
        return found

    # -------------------------------------------------------------------------------------- single runs

    def _run(self, seed: int, target: float, variant: str, role: str, needs: Sequence[Run], **more: Any) -> Run:
        settings = self.settings
        held = {
            "role": role,
            "data": self.profile.dataset.model_dump(mode="json"),
            "widths": self.cell.widths,
            "options": self.cell.options,
            **settings.model_dump(mode="json", include={"batch_size", "momentum", "nesterov", "weight_decay"}),
            "schedule": settings.schedule.model_dump(mode="json"),
            "epochs": settings.epochs,
            "learning_rates": self.rates,
            **more,
        }
        named = (PAPER, variant, self.profile.dataset.source, self.cell.architecture, target, seed)
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
            name += f"-{_percent(length, self.settings.epochs)}"
        return self._imp(seed, target, name, kind, epochs=length, needs=shorter)

    def _trained(self, seed: int, target: float, name: str, needs: Sequence[Run] | None = None, **more: Any) -> Run:
        """A run of a method that prunes during training; needs: its tuning runs, unless given."""
        options = getattr(self.settings, name).model_dump(mode="json") if hasattr(self.settings, name) else {}
        more = {"method": name, "method_options": options, **more}
        more |= {"epochs": self.settings.total_epochs}
        if name in RETRAINED:
            more |= {"epochs": self.settings.epochs, "kind": BASE, "retrain_epochs": self.settings.retrain_epochs}
            more |= {"retraining": self.settings.retraining.model_dump(mode="json")}
        variant = more.pop("variant", name)
        return self._run(seed, target, variant, "during", self._tuning(name, target) if needs is None else needs, **more)

    def _swept(self, seed: int, name: str) -> list[Run]:
        """A method without a target at each of its swept values, and IMP at the sparsity that it reached."""
        swept = {"str": "weight_decays", "cs": "initials", "dst": "penalties"}[name]
        found = []
        for value in getattr(getattr(self.settings, name), swept):
            run = self._trained(seed, 0.0, name, self._tuned_by_imp(), variant=f"{name}-{value:g}", swept=value)
            found += [run, self._imp(seed, 0.0, f"{BASE.lower()}-as-{name}-{value:g}", BASE, needs=[run], matched=True)]
        return found

    def _tuned_by_imp(self) -> list[Run]:
        """Runs from whose validation accuracy the learning rate of dense training follows; none without a choice."""
        if self._dense_tuning is None:
            self._dense_tuning = []
            for seed, rate, label in self._trials("imp"):
                dense = self._run(seed, 0.0, f"{label}-dense", "dense", (), learning_rates=[rate], tuning=True)
                self._dense_tuning += [
                    self._imp(seed, target, label, BASE, dense=dense, tuning=True) for target in self.settings.targets
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


# ------------------------------------------------------------------------------------------ one run


def execute(run: Run, context: Context) -> Outcome:
    """Train and measure one run. Raises RunFailed."""
    data = context.dataset(run.settings["data"])
    role = {"dense": _execute_dense, "imp": _execute_imp, "during": _execute_during, "bimp2022": _execute_bimp2022}
    try:
        return role[run.settings["role"]](run, context, data)
    except Diverged as reason:
        if not run.settings.get("tuning"):
            raise
        # a rate at which training diverges is a bad rate, not a reason to give up the search
        rate = _chosen_rate(run, context)[0] if run.settings["role"] != "imp" else _dense_rate(context)
        details = {"learning_rate": rate, "diverged": str(reason)}
        return Outcome({"validation_accuracy": 0.0, "test_accuracy": None, "test_loss": None}, {}, details=details)


def _execute_dense(run: Run, context: Context, data: Dataset) -> Outcome:
    rate, details = _chosen_rate(run, context)
    model = _network(run, context, data)
    trainer = _trainer(run, context, model, data)
    trainer.fit(_dense_rates(run.settings, rate, len(trainer.batches)), phase="dense")
    outcome = _outcome(run, context, trainer, data, run.settings["epochs"], details)
    outcome.state = {"model": trainer.model.state_dict()}
    return outcome


def _execute_imp(run: Run, context: Context, data: Dataset) -> Outcome:
    settings, dense = run.settings, context.needs[0]
    if dense.record["details"].get("diverged"):
        raise Diverged(dense.record["details"]["diverged"])
    model = _network(run, context, data)
    model.load_state_dict(dense.state["model"])
    masks = Masks.dense(model)
    trainer = _trainer(run, context, model, data, KeepMasked(masks))
    # data order goes on where dense training ended
    trainer.epochs_done = dense.record["settings"]["epochs"]
    rate = _dense_rate(context)
    sparsity = context.needs[1].record["cost"]["sparsity"] if settings.get("matched") else run.target
    if not 0 < sparsity < 1:
        raise RunFailed(f"{context.needs[1].record['variant']} reached a sparsity of {sparsity:g}: nothing to compare with")
    metrics = {"distance_to_pruned": _relative_distance(model, sparsity)}
    before = dense.record["metrics"]["test_accuracy"]
    more, details = _prune_and_retrain(run, trainer, data, masks, sparsity, dense.record["settings"], rate, before)
    metrics |= more
    total = dense.record["settings"]["epochs"] + sum(cycle["epochs"] for cycle in details["cycles"])
    outcome = _outcome(run, context, trainer, data, total, {"learning_rate": rate, **details}, metrics)
    outcome.metrics |= _gain_shares(settings, outcome.metrics, [need.record for need in context.needs[1:]])
    return outcome


def _execute_during(run: Run, context: Context, data: Dataset) -> Outcome:
    settings = run.settings
    rate, details = _chosen_rate(run, context)
    model = context.compute.place(_network(run, context, data))
    batches = Batches(data, "train", settings["batch_size"])
    hook = _method(run, model, len(batches))
    own = settings["method_options"]
    changed = {key: own[key] for key in ("momentum", "weight_decay") if key in own}
    if settings["method"] == "str":
        changed["weight_decay"] = settings["swept"]
    keeper = KeepMasked(hook.masks)
    retrained = settings["method"] in RETRAINED
    hooks = [hook, keeper] if retrained else [hook]
    trainer = _trainer(run, context, model, data, *hooks, decays=hook.decays, **changed)
    trainer.fit(_dense_rates(settings, rate, len(trainer.batches)), phase=settings["method"])
    hook.finish(trainer)
    total, metrics = settings["epochs"], {}
    if retrained:
        trainer.optimizer.state.clear()
        for group in trainer.optimizer.param_groups:
            group |= {"momentum": settings["momentum"], "weight_decay": settings["weight_decay"]}
        before = trainer.evaluate(Batches(data, "test", EVALUATION_BATCH))["accuracy"]
        metrics, more = _prune_and_retrain(run, trainer, data, hook.masks, run.target, settings, rate, before)
        details, total = details | more, total + settings["retrain_epochs"]
    return _outcome(run, context, trainer, data, total, details, metrics)


def _execute_bimp2022(run: Run, context: Context, data: Dataset) -> Outcome:
    settings = run.settings
    rate, details = _chosen_rate(run, context)
    model = _network(run, context, data)
    shape = (settings["total"], settings["epochs"], settings["interval"])
    hook = method.PruneAt(Masks.dense(model), method.bimp_events(run.target, *shape))
    trainer = _trainer(run, context, model, data, hook)
    trainer.fit(method.bimp_rates(rate, *shape, len(trainer.batches)), phase="bimp")
    return _outcome(run, context, trainer, data, settings["total"], details)


def _network(run: Run, context: Context, data: Dataset) -> nn.Module:
    """The freshly initialised network; equal for equal seeds."""
    widths, options = run.settings["widths"], run.settings["options"]
    shape = {"classes": data.classes, "image_shape": data.image_shape, "widths": widths}
    return context.compute.place(build(run.architecture, seed=stream(run.seed, "init"), **shape, **options))


def _trainer(run: Run, context: Context, model: nn.Module, data: Dataset, *hooks: Hooks, **changed: Any) -> Trainer:
    options = {key: run.settings[key] for key in ("momentum", "nesterov", "weight_decay")} | changed
    return context.trainer(model, data, run.settings["batch_size"], hooks, **options)


def _dense_rates(settings: dict[str, Any], rate: float, per_epoch: int) -> list[float]:
    return DenseSchedule.model_validate(settings["schedule"]).rates(rate, settings["epochs"], per_epoch)


def _chosen_rate(run: Run, context: Context) -> tuple[float, dict[str, Any]]:
    """The learning rate with the best mean validation accuracy in the tuning runs, the smallest of equals."""
    rates = run.settings["learning_rates"]
    if len(rates) == 1:
        return rates[0], {"learning_rate": rates[0]}
    found = defaultdict(list)
    for need in context.needs:
        found[need.record["details"]["learning_rate"]].append(need.record["metrics"]["validation_accuracy"])
    means = {rate: sum(values) / len(values) for rate, values in found.items()}
    best = min(means, key=lambda rate: (-means[rate], rate))
    return best, {"learning_rate": best, "tuning": {f"{rate:g}": means[rate] for rate in sorted(means)}}


def _dense_rate(context: Context) -> float:
    """The learning rate of the dense network that a run starts from."""
    return context.needs[0].record["details"]["learning_rate"]


def _prune_and_retrain(
    run: Run,
    trainer: Trainer,
    data: Dataset,
    masks: Masks,
    sparsity: float,
    dense: dict[str, Any],
    rate: float,
    accuracy: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """IMP from the trainer's network; returns metrics and details.

    dense: settings of the dense training; rate: its learning rate; accuracy: on test, before pruning.
    """
    settings, common = run.settings, run.settings["retraining"]
    cycles, epochs = settings.get("cycles", 1), settings["retrain_epochs"]
    share = {"split": epochs} if common["cycle_epochs"] == "split" else {"each": epochs}
    warmup = dense["schedule"]["warmup_epochs"] * len(trainer.batches)
    retraining = method.Retraining(
        settings["kind"],
        method.History(_dense_rates(dense, rate, len(trainer.batches)), warmup),
        dense["epochs"],
        initial=settings.get("initial"),
        warmup_share=settings.get("warmup_share", method.WARMUP_SHARE),
        adaptive_from=cycles - 1 if common["adaptive"] == "2022" else 0,
        reset_momentum=common["reset_momentum"],
        recalibrate=common["recalibrate"],
    )
    test, pruned = Batches(data, "test", EVALUATION_BATCH), []
    done = method.prune_and_retrain(
        trainer,
        masks,
        sparsity,
        method.cycle_epochs(cycles, **share),
        retraining,
        settings.get("allocation", "global"),
        torch.Generator().manual_seed(stream(run.seed, "random-pruning")),
        lambda _, cycle: pruned.append(trainer.evaluate(test)["accuracy"]),
    )
    metrics = {
        "pruned_accuracy": pruned[0],
        "pruning_stability": method.pruning_stability(accuracy, pruned[0]),
        "norm_drop": done[0].norm_drop,
        "prunable_norm_drop": done[0].prunable_norm_drop,
    }
    names = ("fraction", "epochs", "norm_drop", "prunable_norm_drop", "start")
    return metrics, {"cycles": [{name: getattr(cycle, name) for name in names} for cycle in done]}


def _relative_distance(model: nn.Module, sparsity: float) -> float:
    return method.distance_to_pruned(model, sparsity) / math.sqrt(squared_norm(prunable(model).values()))


def _gain_shares(
    settings: dict[str, Any], own: dict[str, Any], others: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """How much of this run's gain by retraining the shorter ones reach, and how long 90 % of it takes.

    Nothing if there are no shorter ones; None where this run gained nothing.
    """
    shorter = [record for record in others if record["settings"]["role"] == "imp"]
    if not shorter:
        return {}
    lengths = [record["settings"]["retrain_epochs"] for record in shorter]
    gains = [record["metrics"]["test_accuracy"] - own["pruned_accuracy"] for record in shorter]
    longest = own["test_accuracy"] - own["pruned_accuracy"]
    found = {
        f"gain_share_{_percent(length, settings['epochs'])}": gain / longest if longest > 0 else None
        for length, gain in zip(lengths, gains)
    }
    epochs = method.saturation_epochs([*lengths, settings["retrain_epochs"]], [*gains, longest])
    return found | {"saturation_share": None if epochs is None else epochs / settings["epochs"]}


def _method(run: Run, model: nn.Module, per_epoch: int) -> baselines.DuringTraining:
    """The hook of a method that prunes during training."""
    settings, own, name = run.settings, run.settings["method_options"], run.settings["method"]
    epochs, decay = settings["epochs"], settings["weight_decay"]
    if name == "gmp":
        return baselines.GMP(model, run.target, epochs, own["interval"], own["recovering"], own["allocation"])
    if name == "dpf":
        return baselines.DPF(model, run.target, epochs, own["interval"])
    if name == "gsm":
        return baselines.GSM(model, run.target, own["rank_over"])
    if name == "lc":
        growth = baselines.lc_weight_decays(own["weight_decay"], epochs) if own["growing"] else None
        return baselines.LC(model, run.target, own["weight_decay"], own["rank_over"], growth)
    if name == "dnw":
        return baselines.DNW(model, run.target)
    if name == "str":
        return baselines.STR(model, own["initial"])
    if name == "cs":
        numbers = (settings["swept"], own["beta_final"], own["penalty"], epochs * per_epoch, decay)
        return baselines.CS(model, *numbers, own["double_decay"])
    return baselines.DST(model, settings["swept"], decay, own["double_decay"])


def _outcome(
    run: Run,
    context: Context,
    trainer: Trainer,
    data: Dataset,
    epochs: int,
    details: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> Outcome:
    """Scores and cost of the trainer's network. epochs: trained in all, dense training included."""
    counted = cost(trainer.model, data.image_shape)
    images = len(data.labels["train"])
    scores = context.scores(trainer, data) | {"epochs": epochs, "trained_macs": counted["dense_macs"] * images * epochs}
    layers = {name: int(weight.detach().count_nonzero()) for name, weight in prunable(trainer.model).items()}
    return Outcome(scores | (metrics or {}), counted, trainer.history, details=details | {"nonzero_by_layer": layers})
