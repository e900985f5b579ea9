"""The experiment: networks whose structure was read from random weights, against controls of equal cost.

For each seed one base network (`dense`) and the gates of the widened network on random weights. Where a
variant asks for it, the widened network is trained too and gates are learned on its trained weights. Every
other run takes a structure at one budget (target = reduction of MACs or parameters), builds the network
afresh and trains it: `-e` for as many epochs as the base network, `-b` for as many MACs. `bpcp-e` alone goes
on from the trained base network and keeps weights (see `bpcp.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from common.core import experiment, models
from common.core.data import Dataset
from common.core.experiment import Cells, CellSettings, Cuts, VariantSettings
from common.core.identity import stream
from common.core.models import Network
from common.core.models.resnet import ResNet
from common.core.recipe import NotNegative, Recipe
from common.core.run import Cell, Context, Job, Outcome
from common.core.trainer import Trainer
from common.settings import Count, Rate, SettingsError, Share, Strict
from replications.pruning_from_scratch import bpcp
from replications.pruning_from_scratch.method import (
    EXPANSION,
    GateSettings,
    budget_epochs,
    density,
    learned,
    learning_rates,
)
from replications.pruning_from_scratch.structure import (
    Layout,
    Ranking,
    Structure,
    beyond,
    largest_reduction,
    noise_gates,
    search,
    similarity,
    uniform_widths,
)

# what the paper spends on CIFAR-10, in images: gate learning, and training of a base network
PUBLISHED_GATE_IMAGES = 10 * 45_000
PUBLISHED_BASE_IMAGES = 160 * 50_000
BPCP = "bpcp-e"
# marks records of work that other runs share and that are no results by themselves
INTERMEDIATE = {"intermediate": True}

Variant = Literal[
    "pfs-e", "pfs-b", "trained-gates-e", "trained-gates-b", "random-gates-e", "random-gates-b",
    "constant-gates-e", "constant-gates-b", "uniform-e", "uniform-b", "bpcp-e",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- settings


class Training(Recipe):
    """As the paper's release has it: the rate changes between epochs alone, milestones are rounded down to an epoch.

    For `cosine` the learning rate is stated for a batch of 256 and grows with the batch size.
    """

    schedule: Literal["multistep", "cosine"] = "multistep"

    def rates(self, per_epoch: int) -> list[float]:
        course = self.schedule, self.learning_rate, self.epochs, per_epoch
        return learning_rates(*course, drops=self.milestones, batch_size=self.batch_size)


class SearchSettings(Strict):
    """How gates become widths."""

    budget: Literal["macs", "parameters"] = "macs"
    """What a target is a reduction of."""
    iterations: Count = 10
    tolerance: Share = 0.001
    """Relative to the target."""
    min_channels: Count = 1
    """How many channels a layer keeps at least."""
    returned: Literal["best", "last"] = "best"
    """Which of the tried structures: the nearest to the budget, or the last as in the paper's release."""
    ties: Literal["first", "random"] = "first"
    """Which of equal gates is kept first: the earlier one, or one drawn for each seed."""


class BlockSettings(Strict):
    """The search for blocks that `bpcp-e` removes; weights are trained along with it as `training` says."""

    weight: NotNegative = 0.05
    """Gamma, the weight of the penalty on each open gate."""
    learning_rate: Rate = 0.1
    """Of the gates' probabilities; constant."""
    recovery_epochs: Count = 10
    """Of training between the removal of blocks and that of channels."""
    recovery_learning_rate: Rate = 0.001


class Settings(VariantSettings):
    """Settings of the paper; the defaults are those of the 8x8 digits."""

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
    budget_epochs: Count | None = None
    """Epochs of -b; those of the base network / (1 - target) when absent."""


# ---------------------------------------------------------------------------------------------- jobs


def layout_of(cell: Cell, data: Dataset) -> Layout:
    """The cell's network as this paper builds it."""
    return Layout.of(cell.architecture, data.classes, data.image_shape, cell.options)


class Sized(Job):
    """A network that is counted beside the base network."""

    def base(self, context: Context) -> Layout:
        """The base network's layout."""
        return layout_of(self.cell, context.data)

    def stream(self, what: str) -> int:
        """A seed for one use."""
        return stream(self.seed, what)

    def measured(self, context: Context, trainer: Trainer, **details: Any) -> Outcome:
        """Scores and cost of the trainer's network; its weights are kept for others."""
        costs, state = self.base(context).cost_of(trainer.model), dict(trainer.model.state_dict())
        return context.measured(trainer, costs=costs, state=state, details=details)


class Trained(Sized):
    """A network that is trained."""

    training: Training

    def trained(self, context: Context, model: Network, epochs: int, **details: Any) -> Outcome:
        """`model` after so many epochs."""
        recipe = self.training.changed(epochs=epochs)
        trainer = recipe.trainer(context, model)
        trainer.fit(recipe.rates(len(trainer.batches)))
        return self.measured(context, trainer, widths=model.widths, epochs=epochs, **details)


class Dense(Trained):
    """The base network."""

    def execute(self, context: Context) -> Outcome:
        model = self.base(context).build(seed=self.stream("network"))
        return self.trained(context, model, self.training.epochs)


class Expanded(Trained):
    """The widened network, trained: what the control learns its gates on."""

    expansion: float

    def execute(self, context: Context) -> Outcome:
        model = self.base(context).expanded(self.expansion).build(seed=self.stream("widened network"))
        return self.trained(context, model, self.training.epochs, **INTERMEDIATE)


class LearnGates(Sized):
    """Gates on the widened network, as it was initialised or as its training left it."""

    expansion: float
    gates: GateSettings
    start: Expanded | None = None

    def execute(self, context: Context) -> Outcome:
        wide = self.base(context).expanded(self.expansion)
        model = wide.build(seed=self.stream("widened network"))
        if self.start:
            model.load_state_dict(context.of(self.start).state)
        trainer, gates, found = learned(context, context.data, wide.gated, model, self.gates)
        outcome = self.measured(context, trainer, **found, **INTERMEDIATE)
        values = gates.values.detach()
        outcome.metrics |= {
            "density": density(values),
            "mean_gate": values.mean().item(),
            "gates_at_one": (values == 1).double().mean().item(),
        }
        outcome.state = {"gates": [layer.cpu() for layer in gates.layers()]}
        return outcome


class Small(Trained):
    """A network whose structure meets the budget, built afresh and trained for `epochs` epochs."""

    search: SearchSettings
    epochs: Count

    def built(
        self, context: Context, layout: Layout, widths: Sequence[int], facts: dict[str, Any]
    ) -> Outcome:
        """The network with these widths of a layout, trained."""
        model = layout.build(widths, seed=self.stream("network"))
        outcome = self.trained(context, model, self.epochs, kept_fractions=_shares(widths, layout))
        outcome.metrics |= facts
        return outcome


class Uniform(Small):
    """The base network with equally scaled widths."""

    def execute(self, context: Context) -> Outcome:
        base, unit = self.base(context), self.search.budget
        found = uniform_widths(base.widths, base.spends(unit), self.target)
        return self.built(context, base, found.widths, {"reduction": 1 - found.cost / base.cost()[unit]})


class Searched(Small):
    """The widened network with the widths that gates lead to: learned ones, drawn ones, or all equal."""

    expansion: float
    gates: LearnGates | Literal["random", "constant"]
    other: LearnGates | None = None
    """Gates whose structure is compared with this one."""

    def execute(self, context: Context) -> Outcome:
        wide = self.base(context).expanded(self.expansion)
        if isinstance(self.gates, LearnGates):
            gates = context.of(self.gates).state["gates"]
        elif self.gates == "random":
            gates = noise_gates(wide.widths, self.stream("random gates"))
        else:
            gates = [torch.ones(width) for width in wide.widths]
        found = self.structure(context, wide, gates)
        facts = {
            "reduction": found.candidate.reduction,
            "converged": found.status == "converged",
            "tied_share": found.tied_share,
        }
        if self.other:
            other = self.structure(context, wide, context.of(self.other).state["gates"])
            both = [_shares(structure.candidate.widths, wide) for structure in (found, other)]
            facts["similarity_to_random_weights"] = similarity(both)[0, 1].item()
        elif isinstance(self.gates, LearnGates):
            # forward MACs of gate learning as a share of those of training the base network: here, and in the paper
            surplus = wide.cost()["macs"] / self.base(context).cost()["macs"]
            facts["search_cost"] = surplus * self.gates.gates.epochs / self.training.epochs
            facts["search_cost_published"] = surplus * PUBLISHED_GATE_IMAGES / PUBLISHED_BASE_IMAGES
        return self.built(context, wide, found.candidate.widths, facts)

    def structure(self, context: Context, wide: Layout, gates: list[Tensor]) -> Structure:
        """What the search makes of gates at this budget."""
        options = self.search
        return search(
            Ranking.of(gates, options.ties, self.stream("ties")),
            wide.spends(options.budget),
            self.base(context).cost()[options.budget],
            self.target,
            iterations=options.iterations,
            tolerance=options.tolerance,
            min_channels=options.min_channels,
            returned=options.returned,
        )


class BlockSearch(Trained):
    """The trained base network, trained on while gates learn which of its blocks to keep."""

    start: Dense
    blocks: BlockSettings

    def execute(self, context: Context) -> Outcome:
        model = residual(self.base(context))
        model.load_state_dict(context.of(self.start).state)
        gates = bpcp.BlockGates(context.compute.place(model), self.blocks.weight, self.blocks.learning_rate)
        trainer = self.training.trainer(context, model, gates)
        trainer.fit(self.training.rates(len(trainer.batches)), phase="blocks")
        alpha = gates.alpha.detach().cpu()
        probabilities = bpcp.probability(alpha).tolist()
        outcome = self.measured(
            context, trainer, epochs=self.training.epochs, probabilities=probabilities, **INTERMEDIATE
        )
        outcome.state = {"weights": outcome.state, "alpha": alpha}
        return outcome


class Blockwise(Trained):
    """The network of the block search without its closed blocks, narrowed to the budget, and trained on."""

    found: BlockSearch
    search: SearchSettings

    def execute(self, context: Context) -> Outcome:
        base, blocks, found = self.base(context), self.found.blocks, context.of(self.found).state
        model = residual(base)
        model.load_state_dict(found["weights"])
        reference = base.cost()[self.search.budget]
        budget = (1 - self.target) * reference

        def spent(network: nn.Module) -> int:
            spent: int = base.cost_of(network)[self.search.budget]
            return spent

        removed = bpcp.drop_blocks(model, found["alpha"], budget, spent)
        recovery = self.training.trainer(context, model)
        steps = blocks.recovery_epochs * len(recovery.batches)
        recovery.fit([blocks.recovery_learning_rate] * steps, phase="recovery")
        bpcp.drop_channels(model, budget, spent, self.search.min_channels)
        trainer = self.training.trainer(context, model)
        trainer.go_on_from(recovery.epochs_done, recovery.history)
        trainer.fit(self.training.rates(len(trainer.batches)))
        outcome = self.measured(
            context,
            trainer,
            epochs=self.training.epochs,
            earlier_epochs=2 * self.training.epochs + blocks.recovery_epochs,
            removed_blocks=removed,
            widths=model.widths,
        )
        reduction = 1 - spent(model) / reference
        outcome.metrics |= {
            "reduction": reduction,
            "converged": abs(reduction - self.target) <= self.search.tolerance * self.target,
            "kept_blocks": 1 - len(removed) / len(found["alpha"]),
        }
        return outcome


def _shares(widths: Sequence[int], layout: Layout) -> list[float]:
    return [width / full for width, full in zip(widths, layout.widths, strict=True)]


def residual(base: Layout) -> ResNet:
    """The base network. Raises SettingsError when it is none of which blocks can be removed."""
    model = base.build()
    if not bpcp.applies(model):
        able = [name for name, known in models.ARCHITECTURES.items() if known.network is ResNet]
        raise SettingsError(
            f"variants.{BPCP}: {base.architecture} has no residual blocks between streams that can be "
            f"narrowed; possible: {', '.join(able)}, resnet<6n+2>, with shortcut B"
        )
    return model


# ---------------------------------------------------------------------------------------------- which jobs


class Experiment(experiment.Experiment[Settings]):
    """The jobs of one cell."""

    def __init__(self, settings: Settings, cell: Cell, data: Dataset):
        super().__init__(settings, cell, data)
        base, options = layout_of(cell, data), settings.search
        unit, least = options.budget, options.min_channels
        reference = base.cost()[unit]

        def most(layout: Layout, least: int) -> float:
            return largest_reduction(layout.widths, layout.spends(unit), reference, least)

        uniform, searched = most(base, 1), most(base.expanded(settings.expansion), least)
        for variant, targets in settings.wanted.items():
            reachable = uniform if variant.startswith("uniform") else searched
            if variant == BPCP:
                reachable = 1 - base.cost_of(bpcp.smallest(residual(base), least))[unit] / reference
            for target in targets:
                if beyond(target, reachable, options.tolerance):
                    raise SettingsError(
                        f"variants.{variant}: a reduction of {target:g} cannot be reached; with its least widths "
                        f"{base.architecture} saves {reachable:.4f} of the {unit} of the base network"
                    )

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
        source, _, schedule = variant.rpartition("-")
        epochs = self.settings.training.epochs
        if schedule == "b":
            epochs = self.settings.budget_epochs or budget_epochs(epochs, target)
        if source == "uniform":
            return self.job(Uniform, variant, seed, target, epochs=epochs)
        if source in ("random-gates", "constant-gates"):
            gates: dict[str, Any] = {"gates": source.removesuffix("-gates")}
        elif source == "pfs":
            gates = {"gates": self.gates(target, seed)}
        else:
            expanded = self.job(Expanded, "expanded", seed)
            gates = {"gates": self.gates(target, seed, expanded), "other": self.gates(target, seed)}
        return self.job(Searched, variant, seed, target, epochs=epochs, **gates)

    def gates(self, target: float, seed: int, start: Expanded | None = None) -> LearnGates:
        """Gates for a target, or for all where their level does not depend on it."""
        gates, weights = self.settings.gates, "trained" if start else "random"
        if gates.level == "budget":
            gates = gates.model_copy(update={"level": 1 - target})
        else:
            target = 0.0
        return self.job(LearnGates, f"gates-on-{weights}-weights", seed, target, gates=gates, start=start)
