"""What is trained: base and widened networks, gates, networks of the structures that they lead to, and controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.core import models
from common.core.data import Dataset
from common.core.identity import stream
from common.core.models import Network, weight_of
from common.core.models.resnet import ResNet
from common.core.pruning import channels
from common.core.run import Cell, Context, Job, Outcome
from common.core.trainer import Trainer
from common.settings import Count, SettingsError
from replications.pruning_from_scratch import bpcp
from replications.pruning_from_scratch.bpcp import BlockSettings
from replications.pruning_from_scratch.method import FineTuning, GateSettings, Training, density, learned
from replications.pruning_from_scratch.structure import (
    Layout,
    Ranking,
    SearchSettings,
    Structure,
    UniformWidths,
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

    def trained(
        self, context: Context, model: Network, recipe: Training, after: int = 0, **details: Any
    ) -> Outcome:
        """`model` trained by a recipe, on from where another training stood `after` so many epochs."""
        trainer = recipe.trainer(context, model)
        trainer.go_on_from(after)
        trainer.fit(recipe.rates(len(trainer.batches)), phase="fine-tuning" if after else "train")
        return self.measured(context, trainer, widths=model.widths, epochs=recipe.epochs, **details)


class Dense(Trained):
    """The base network."""

    def execute(self, context: Context) -> Outcome:
        model = self.base(context).build(seed=self.stream("network"))
        return self.trained(context, model, self.training)


class Expanded(Trained):
    """The widened network, trained: what the control learns its gates on."""

    expansion: float

    def execute(self, context: Context) -> Outcome:
        model = self.base(context).expanded(self.expansion).build(seed=self.stream("widened network"))
        return self.trained(context, model, self.training, **INTERMEDIATE)


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
    """A network whose structure meets the budget, trained for `epochs` epochs."""

    search: SearchSettings
    epochs: Count

    def built(
        self,
        context: Context,
        layout: Layout,
        widths: Sequence[int],
        facts: dict[str, Any],
        earlier: float = 0.0,
    ) -> Outcome:
        """The network with these widths of a layout, built afresh and trained."""
        model = layout.build(widths, seed=self.stream("network"))
        outcome = self.trained(context, model, self.training.changed(epochs=self.epochs))
        return self.described(outcome, layout, facts, earlier)

    def described(
        self, outcome: Outcome, layout: Layout, facts: dict[str, Any], earlier: float = 0.0
    ) -> Outcome:
        """What it comes to, with facts of its structure and what all training for it has cost.

        earlier: forward MACs spent before, as a share of those of training the base network.
        """
        share = outcome.cost["macs"] / outcome.cost["dense_macs"] * self.epochs / self.training.epochs
        outcome.metrics |= facts | {"training_cost": earlier + share}
        outcome.details["kept_fractions"] = _shares(outcome.details["widths"], layout)
        return outcome

    def uniform(self, base: Layout) -> tuple[UniformWidths, dict[str, Any]]:
        """The base network's widths scaled alike to the budget, and the reduction."""
        unit = self.search.budget
        found = uniform_widths(base.widths, base.spends(unit), self.target)
        return found, {"reduction": 1 - found.cost / base.cost()[unit]}


class Uniform(Small):
    """The base network with equally scaled widths."""

    def execute(self, context: Context) -> Outcome:
        base = self.base(context)
        found, facts = self.uniform(base)
        return self.built(context, base, found.widths, facts)


class FineTuned(Small):
    """The trained base network, narrowed to equally scaled widths by the L1 norm of its channels, and trained on."""

    start: Dense
    fine_tuning: FineTuning

    def execute(self, context: Context) -> Outcome:
        base = self.base(context)
        found, facts = self.uniform(base)
        model = base.build()
        model.load_state_dict(context.of(self.start).state)
        channels.remove(model, largest_norms(model, found.widths))
        recipe = self.training.changed(epochs=self.epochs, **self.fine_tuning.model_dump())
        outcome = self.trained(context, model, recipe, after=self.training.epochs)
        return self.described(outcome, base, facts, earlier=1.0)


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
        earlier = 0.0
        if isinstance(self.gates, LearnGates):
            # forward MACs of gate learning as a share of those of training the base network: here, and in the paper
            surplus = wide.cost()["macs"] / self.base(context).cost()["macs"]
            facts["search_cost"] = surplus * self.gates.gates.epochs / self.training.epochs
            facts["search_cost_published"] = surplus * PUBLISHED_GATE_IMAGES / PUBLISHED_BASE_IMAGES
            earlier = facts["search_cost"] + (surplus if self.gates.start else 0.0)
        if self.other:
            other = self.structure(context, wide, context.of(self.other).state["gates"])
            both = [_shares(structure.candidate.widths, wide) for structure in (found, other)]
            facts["similarity_to_random_weights"] = similarity(both)[0, 1].item()
        return self.built(context, wide, found.candidate.widths, facts, earlier)

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
            min_channels=options.least(wide.widths),
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


def largest_norms(model: Network, widths: Sequence[int]) -> dict[str, Tensor]:
    """The channels of each gated layer with the largest L1 norm of their weights, so many as `widths` says, ascending.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. Of equal norms the first stays.
    """
    kept = {}
    # the outputs of residual branches, which no gate is for, have no norm of their own
    groups = [group for group in model.channel_groups() if group.norm]
    for group, width in zip(groups, widths, strict=True):
        norms = weight_of(model, group.name).detach().abs().flatten(1).sum(1)
        kept[group.name] = norms.argsort(descending=True, stable=True)[:width].sort().values
    return kept


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
