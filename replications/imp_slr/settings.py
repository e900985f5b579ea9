"""The settings of the IMP paper in `params.yaml`; defaults are those of the `digits` profile."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from common.core import schedules
from common.core.pruning.masks import Allocation
from common.settings import CellSettings, Count, PaperSettings, Rate, Seeds, Share, Strict, Targets
from replications.imp_slr import baselines, method

Experiment = Literal["schedules", "during", "allocations", "lengths", "cycles", "short", "bimp"]
During = Literal["gmp", "dpf", "gsm", "lc", "dnw", "str", "cs", "dst"]
# these aim at no sparsity: they are swept, and IMP is run at the sparsity that they reach
UNTARGETED = ("str", "cs", "dst")
# these end in an ordinary prune-and-retrain
RETRAINED = ("gsm", "lc")
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Cell(CellSettings):
    """A network, and the experiments that are made with it."""

    architecture: str = "mlp"
    widths: tuple[Count, ...] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
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
            return schedules.step(
                rate, step_epochs=max(1, round(self.every * epochs)), gamma=self.gamma, **shape
            )
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


class RetrainingSettings(Strict):
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
    rank_over: baselines.RankOver = "all"


class LCSettings(Strict):
    weight_decay: NotNegative = 5e-3
    rank_over: baselines.RankOver = "all"
    growing: bool = False
    """Let the weight decay grow as in the 2022 code."""


class STRSettings(Strict):
    initial: float = -5.0
    """Every layer's threshold is sigmoid of a learnt number that starts here."""
    weight_decays: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (1e-2, 2e-2)
    """Swept: they drive the sparsity."""


class CSSettings(Strict):
    initials: Annotated[tuple[float, ...], Field(min_length=1)] = (-0.1, 0.0)
    """Swept: first value of the mask parameters."""
    beta_final: Annotated[float, Field(ge=1)] = 200.0
    penalty: NotNegative = 1e-5
    double_decay: bool = False


class DSTSettings(Strict):
    penalties: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (3e-3, 1e-2)
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
    retraining: RetrainingSettings = RetrainingSettings()
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
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be fewer than the {self.epochs} epochs")
        for name in ("lengths", "short_lengths"):
            lengths = getattr(self, name)
            if self.retrain_epochs in lengths:
                raise ValueError(
                    f"{name} must leave out retrain_epochs = {self.retrain_epochs}, which always runs"
                )
            if len({percent(length, self.epochs) for length in lengths}) < len(lengths):
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
        if len({percent(share, 1) for share in self.bimp.shares}) < len(dense):
            raise ValueError("bimp.shares must differ by at least a percent")
        if self.bimp.reading == "2022" and self.total_epochs - max(dense) < self.bimp.interval:
            raise ValueError("bimp.interval must fit into the epochs after dense training")
        return self


def percent(part: float, whole: float) -> str:
    """How names of variants write a share."""
    return f"{round(100 * part / whole)}pct"
