"""The experiment: networks whose structure was read from random weights, against controls of equal cost.

For each seed one base network (`dense`) and the gates of the widened network on random weights. Where a
variant asks for it, the widened network is trained too and gates are learned on its trained weights. Every
other run takes a structure at one budget (target = reduction of MACs or parameters), builds the network
afresh and trains it: `-e` for as many epochs as the base network, `-b` for as many MACs. `l1-fine-tuned-*` and
`bpcp-e` (see `bpcp.py`) go on from the trained base network and keep weights: the former for as many epochs
(`-e`) or MACs (`-b`) as the search for gates, so that in all they cost what `pfs-*` do. Variants in `SWITCHES` are
others with one setting changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from common.core import experiment
from common.core.data import Dataset
from common.core.experiment import Cells, CellSettings, Cuts, VariantSettings
from common.core.run import Cell, Job
from common.settings import Count, SettingsError
from replications.pruning_from_scratch import bpcp
from replications.pruning_from_scratch.bpcp import BlockSettings
from replications.pruning_from_scratch.jobs import (
    BPCP,
    BlockSearch,
    Blockwise,
    Dense,
    Expanded,
    FineTuned,
    LearnGates,
    Searched,
    Uniform,
    layout_of,
    residual,
)
from replications.pruning_from_scratch.method import (
    EXPANSION,
    FineTuning,
    GateSettings,
    Training,
    budget_epochs,
)
from replications.pruning_from_scratch.structure import (
    SearchSettings,
    beyond,
    largest_reduction,
)

Variant = Literal[
    "pfs-e", "pfs-b", "trained-gates-e", "trained-gates-b", "random-gates-e", "random-gates-b",
    "constant-gates-e", "constant-gates-b", "uniform-e", "uniform-b", "l1-fine-tuned-e", "l1-fine-tuned-b", "bpcp-e",
    "pfs-last-e", "pfs-level-0.2-e", "pfs-expansion-1-e", "pfs-expansion-1.5-e",
    "trained-gates-one-channel-e", "l1-fine-tuned-low-rate-e",
]  # fmt: skip

SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "pfs-last": ("pfs", {"search": {"returned": "last"}}),
    "pfs-level-0.2": ("pfs", {"gates": {"level": 0.2}}),
    "pfs-expansion-1": ("pfs", {"expansion": 1.0}),
    "pfs-expansion-1.5": ("pfs", {"expansion": 1.5}),
    "trained-gates-one-channel": ("trained-gates", {"search": {"min_channels": 1, "min_share": 0.0}}),
    "l1-fine-tuned-low-rate": ("l1-fine-tuned", {"fine_tuning": {"learning_rate": 0.001, "milestones": []}}),
}
"""Variants, without how long they train, that are another one with other settings."""

# ---------------------------------------------------------------------------------------------- settings


class Settings(VariantSettings):
    """Settings of the paper; the defaults fit the 8x8 digits."""

    cells: Cells = (CellSettings(architecture="digits_vgg"),)
    targets: Cuts = (0.5, 0.8)
    expansion: Annotated[float, Field(ge=1, le=4)] = EXPANSION
    """Width of the network that carries the gates, relative to the base network."""
    variants: dict[Variant, Cuts | Literal["all"]] = {
        "pfs-e": (0.5, 0.8, 0.9),
        "pfs-b": "all",
        "trained-gates-e": "all",
        "random-gates-e": (0.8,),
        "uniform-e": "all",
    }
    """-e trains for as many epochs as the base network, -b for as many MACs."""
    gates: GateSettings = GateSettings()
    search: SearchSettings = SearchSettings()
    blocks: BlockSettings = BlockSettings()
    training: Training = Training(epochs=30, batch_size=64, learning_rate=0.1, weight_decay=1e-4)
    """Of base, widened and pruned networks; -b has other epochs."""
    fine_tuning: FineTuning = FineTuning()
    """Of the trained base network without its channels of least L1 norm, in place of what `training` says."""
    budget_epochs: Count | None = None
    """Epochs of -b; those of the base network / (1 - target) when absent."""


# ---------------------------------------------------------------------------------------------- which jobs


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell."""

    def __init__(self, settings: Settings, cell: Cell, data: Dataset):
        super().__init__(settings, cell, data)
        self.base, self._mark = layout_of(cell, data), ""
        for variant, targets in settings.wanted.items():
            switched, plain = self.switched(variant)
            reachable = switched.reachable(plain)
            for target in targets:
                if beyond(target, reachable, settings.search.tolerance):
                    raise SettingsError(
                        f"variants.{variant}: a reduction of {target:g} cannot be reached; with its least widths "
                        f"{self.base.architecture} saves {reachable:.4f} of the {settings.search.budget} of the base network"
                    )

    def switched(self, variant: str) -> tuple[Experiment, str]:
        """The experiment with the settings of a variant, and the name that the variant has there."""
        name, _, schedule = variant.rpartition("-")
        if name not in SWITCHES:
            return self, variant
        plain, changes = SWITCHES[name]
        settings = self.settings.changed(changes, f"variants.{variant}").model_copy(update={"variants": {}})
        other = Experiment(settings, self.cell, self.data)
        if {"gates", "expansion"} & changes.keys():
            other._mark = f"-{name}"
        return other, f"{plain}-{schedule}"

    def reachable(self, variant: str) -> float:
        """The largest reduction that a variant allows."""
        options, base = self.settings.search, self.base
        unit = options.budget
        reference = base.cost()[unit]
        if variant == BPCP:
            least = bpcp.smallest(residual(base), options.min_channels)
            return 1 - base.cost_of(least)[unit] / reference
        if variant.startswith(("uniform", "l1-fine-tuned")):
            return largest_reduction(base.widths, base.spends(unit), reference, 1)
        wide = base.expanded(self.settings.expansion)
        return largest_reduction(wide.widths, wide.spends(unit), reference, options.least(wide.widths))

    def jobs(self, seed: int) -> Iterator[Job]:
        yield self.dense(seed)
        for variant, targets in self.settings.wanted.items():
            for target in targets:
                yield self.pruned(variant, target, seed)

    def dense(self, seed: int) -> Dense:
        """The base network."""
        return self.job(Dense, "dense", seed)

    def pruned(self, variant: str, target: float, seed: int) -> Job:
        """A network that meets a budget."""
        if variant == BPCP:
            found = self.job(BlockSearch, "block-search", seed, start=self.dense(seed))
            return self.job(Blockwise, variant, seed, target, found=found)
        switched, plain = self.switched(variant)
        source, _, schedule = plain.rpartition("-")
        if source == "l1-fine-tuned":
            more = {"start": self.dense(seed), "epochs": switched.fine_tuning_epochs(schedule, target)}
            return switched.job(FineTuned, variant, seed, target, **more)
        epochs = self.settings.training.epochs
        if schedule == "b":
            epochs = self.settings.budget_epochs or budget_epochs(epochs, target)
        if source == "uniform":
            return self.job(Uniform, variant, seed, target, epochs=epochs)
        gates = switched.sources(source, target, seed)
        return switched.job(Searched, variant, seed, target, epochs=epochs, **gates)

    def fine_tuning_epochs(self, schedule: str, target: float) -> int:
        """As many as the search for gates has (`e`), or so many that they cost as many forward MACs (`b`)."""
        epochs = self.settings.gates.epochs
        if schedule == "e":
            return epochs
        surplus = self.base.expanded(self.settings.expansion).cost()["macs"] / self.base.cost()["macs"]
        return budget_epochs(epochs * surplus, target)

    def sources(self, source: str, target: float, seed: int) -> dict[str, Any]:
        """What the widths of a searched structure are read from."""
        if source in ("random-gates", "constant-gates"):
            return {"gates": source.removesuffix("-gates")}
        if source == "pfs":
            return {"gates": self.gates(target, seed)}
        expanded = self.job(Expanded, f"expanded{self._mark}", seed)
        return {"gates": self.gates(target, seed, expanded), "other": self.gates(target, seed)}

    def gates(self, target: float, seed: int, start: Expanded | None = None) -> LearnGates:
        """Gates for a target, or for all where their level does not depend on it."""
        gates, weights = self.settings.gates, "trained" if start else "random"
        if gates.level == "budget":
            gates = gates.model_copy(update={"level": 1 - target})
        else:
            target = 0.0
        name = f"gates-on-{weights}-weights{self._mark}"
        return self.job(LearnGates, name, seed, target, gates=gates, start=start)
