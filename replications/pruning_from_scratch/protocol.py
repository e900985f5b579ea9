"""The experiment: networks whose structure was read from random weights, against controls of equal cost.

For each seed one base network (`dense`) and the gates of the widened network on random weights. Where a
variant asks for it, the widened network is trained too and gates are learned on its trained weights. Every
other run takes a structure at one budget (target = reduction of MACs or parameters), builds the network
afresh and trains it: `-e` for as many epochs as the base network, `-b` for as many MACs. `bpcp-e` alone goes
on from the trained base network and keeps weights (see `bpcp.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import nn

from common.core import loading, models
from common.core.data import Dataset
from common.core.identity import stream
from common.core.models import Network
from common.core.models.resnet import ResNet
from common.core.run import Context, Outcome, Run
from common.core.trainer import Decays, Hooks, Trainer
from common.settings import (
    Count,
    DatasetSettings,
    PaperSettings,
    Profile,
    Rate,
    SettingsError,
    Share,
    Sparsity,
    Strict,
    Targets,
)
from replications.pruning_from_scratch import bpcp
from replications.pruning_from_scratch.method import (
    Gates,
    budget_epochs,
    density,
    kept_epoch,
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

PAPER = "pruning_from_scratch"
EXPANSION = 1.25
# what the paper spends on CIFAR-10, in images: gate learning, and training of a base network
PUBLISHED_GATE_IMAGES = 10 * 45_000
PUBLISHED_BASE_IMAGES = 160 * 50_000

ON_RANDOM, ON_TRAINED = "gates-on-random-weights", "gates-on-trained-weights"
BPCP, BLOCKS = "bpcp-e", "block-search"
# marks records of work that other runs share and that are no results by themselves
INTERMEDIATE = {"intermediate": True}

Variant = Literal[
    "pfs-e", "pfs-b", "trained-gates-e", "trained-gates-b", "random-gates-e", "random-gates-b",
    "constant-gates-e", "constant-gates-b", "uniform-e", "uniform-b", "bpcp-e",
]  # fmt: skip


def _positive(targets: tuple[float, ...]) -> tuple[float, ...]:
    if min(targets) <= 0:
        raise ValueError("a budget must lie between 0 and 1; the dense network is run in any case")
    return targets


Budgets = Annotated[Targets, AfterValidator(_positive)]


class GateSettings(Strict):
    """How gates are learned; Adam, its learning rate constant."""

    epochs: Count = 20
    batch_size: Count = 32
    learning_rate: Rate = 0.01
    weight: Annotated[float, Field(ge=0)] = 0.5
    """Lambda, the weight of the penalty on the mean gate."""
    level: Literal["budget"] | Share = 0.5
    """s, the mean gate that the penalty aims at; `budget` is 1 - target, which needs gates for every target.
    """

    @property
    def aim(self) -> float:
        """The level as a number; that of a budget is one from the run on."""
        if isinstance(self.level, str):
            raise ValueError(f"gates of level {self.level!r} are learned for a target")
        return self.level


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

    weight: Annotated[float, Field(ge=0)] = 0.05
    """Gamma, the weight of the penalty on each open gate."""
    learning_rate: Rate = 0.1
    """Of the gates' probabilities; constant."""
    recovery_epochs: Count = 10
    """Of training between the removal of blocks and that of channels."""
    recovery_learning_rate: Rate = 0.001


class TrainingSettings(Strict):
    """How base, widened and pruned networks are trained; SGD."""

    epochs: Count = 30
    """Of the base network and of Scratch-E."""
    batch_size: Count = 64
    learning_rate: Rate = 0.1
    """For `cosine` it is stated for a batch of 256 and grows with the batch size."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    drops: tuple[Share, ...] = (0.5, 0.75)
    """Shares of training at which `multistep` divides the learning rate by ten."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay: Literal["all", "weights"] = "all"
    """`weights` spares batch norms, biases and depthwise convolutions."""
    label_smoothing: Sparsity = 0.0
    budget_epochs: Count | None = None
    """Epochs of Scratch-B; base epochs / (1 - target) when absent."""


class NetworkSettings(Strict):
    """A network by its name in common.core.models, options of its class, and the images that it is trained on."""

    name: str = "digits_vgg"
    options: dict[str, Any] = {}
    data: DatasetSettings | None = None
    """In place of the profile's data set."""


class Settings(PaperSettings):
    """Settings of the paper; the defaults are those of the 8x8 digits."""

    architectures: Annotated[tuple[NetworkSettings, ...], Field(min_length=1)] = (NetworkSettings(),)
    expansion: Annotated[float, Field(ge=1, le=4)] = EXPANSION
    """Width of the network that carries the gates, relative to the base network."""
    variants: Annotated[dict[Variant, Budgets], Field(min_length=1)] = {
        "pfs-e": (0.5, 0.8, 0.9),
        "pfs-b": (0.5, 0.8),
        "trained-gates-e": (0.5, 0.8),
        "random-gates-e": (0.8,),
        "uniform-e": (0.5, 0.8),
    }
    """Variants with the targets at which each is run; -e trains for as many epochs as the base network, -b
    for as many MACs.
    """
    gates: GateSettings = GateSettings()
    search: SearchSettings = SearchSettings()
    blocks: BlockSettings = BlockSettings()
    training: TrainingSettings = TrainingSettings()


# ---------------------------------------------------------------------------------------------- which runs


def runs(profile: Profile) -> list[Run]:
    """Every run of the experiment.

    Raises SettingsError for an architecture that cannot be gated or built, that is named twice for the same
    data, or that a variant cannot prune, and for a budget that no structure meets.
    """
    settings: Settings = profile.paper
    listed, cells = [], set()
    for architecture in settings.architectures:
        images = architecture.data or profile.dataset
        cell = (architecture.name, images.name)
        if cell in cells:
            raise SettingsError(
                f"{PAPER}.architectures: must not repeat a network on the same data: {cell[0]} on {cell[1]}"
            )
        cells.add(cell)
        data = loading.load(images)
        base = Layout.of(architecture.name, data.classes, data.image_shape, architecture.options)
        _check_budgets(settings, base)
        for seed in settings.seeds:
            listed += _Runs(settings, images, architecture, seed).all()
    return listed


def _check_budgets(settings: Settings, base: Layout) -> None:
    unit, reference = settings.search.budget, base.cost()[settings.search.budget]
    least = settings.search.min_channels

    def floor(layout: Layout, least: int) -> float:
        return largest_reduction(layout.widths, layout.spends(unit), reference, least)

    uniform, searched = floor(base, 1), floor(base.expanded(settings.expansion), least)
    for variant, targets in settings.variants.items():
        most = uniform if variant.startswith("uniform") else searched
        if variant == BPCP:
            most = 1 - base.cost_of(bpcp.smallest(_residual(base), least))[unit] / reference
        for target in targets:
            if beyond(target, most, settings.search.tolerance):
                raise SettingsError(
                    f"{PAPER}.variants.{variant}: a reduction of {target:g} cannot be reached; with its "
                    f"least widths {base.architecture} saves {most:.4f} of the {unit} of the base network"
                )


def _residual(base: Layout) -> ResNet:
    """The base network. Raises SettingsError when it is none of which blocks can be removed."""
    model = base.build()
    if not bpcp.applies(model):
        able = [name for name, known in models.ARCHITECTURES.items() if known.network is ResNet]
        raise SettingsError(
            f"{PAPER}.variants.{BPCP}: {base.architecture} has no residual blocks between streams that can be "
            f"narrowed; possible: {', '.join(able)}, resnet<6n+2>, with shortcut B"
        )
    return model


class _Runs:
    """The runs of one architecture and seed."""

    def __init__(self, settings: Settings, data: DatasetSettings, architecture: NetworkSettings, seed: int):
        self.settings = settings
        self.cell = (data.name, architecture.name)
        self.seed = seed
        self.common = {
            "data": data.model_dump(mode="json"),
            "options": architecture.options,
            "expansion": self.settings.expansion,
            "training": self.settings.training.model_dump(mode="json"),
        }

    def all(self) -> list[Run]:
        wanted = [
            (variant, target) for variant, targets in self.settings.variants.items() for target in targets
        ]
        return [self.run("dense", 0.0), *(self.pruned(variant, target) for variant, target in wanted)]

    def pruned(self, variant: str, target: float) -> Run:
        search = self.settings.search.model_dump(mode="json")
        if variant == BPCP:
            blocks = self.settings.blocks.model_dump(mode="json")
            found = self.run(BLOCKS, 0.0, (self.run("dense", 0.0),), blocks=blocks)
            return self.run(variant, target, (found,), search=search, blocks=blocks)
        needs: tuple[Run, ...] = ()
        if variant.startswith("pfs"):
            needs = (self.gates(ON_RANDOM, target),)
        elif variant.startswith("trained-gates"):
            # the structure from random weights as well, to compare with
            needs = (self.gates(ON_TRAINED, target), self.gates(ON_RANDOM, target))
        return self.run(variant, target, needs, search=search)

    def gates(self, variant: str, target: float) -> Run:
        gates = self.settings.gates.model_dump(mode="json")
        if gates["level"] == "budget":
            gates["level"] = 1 - target
        else:
            target = 0.0
        needs = (self.run("expanded", 0.0),) if variant == ON_TRAINED else ()
        return self.run(variant, target, needs, gates=gates)

    def run(self, variant: str, target: float, needs: tuple[Run, ...] = (), **settings: Any) -> Run:
        return Run(PAPER, variant, *self.cell, target, self.seed, {**self.common, **settings}, needs)


# ---------------------------------------------------------------------------------------------- one run


def execute(run: Run, context: Context) -> Outcome:
    """Train and measure one run. Raises RunFailed when training diverges."""
    one = _Execution(run, context)
    if run.variant == "dense":
        return one.dense()
    if run.variant == "expanded":
        return one.expanded()
    if run.variant in (ON_RANDOM, ON_TRAINED):
        return one.gates()
    if run.variant == BLOCKS:
        return one.block_search()
    if run.variant == BPCP:
        return one.bpcp()
    return one.pruned()


class _Execution:
    """One run with its networks."""

    def __init__(self, run: Run, context: Context):
        self.run, self.context = run, context
        self.data = context.dataset(run.settings["data"])
        self.base = Layout.of(
            run.architecture, self.data.classes, self.data.image_shape, run.settings["options"]
        )
        self.wide = self.base.expanded(run.settings["expansion"])
        self.training = TrainingSettings.model_validate(run.settings["training"])

    def seed(self, what: str) -> int:
        return stream(self.run.seed, what)

    def dense(self) -> Outcome:
        """The base network."""
        return self.trained(self.base.build(seed=self.seed("network")), self.training.epochs)

    def expanded(self) -> Outcome:
        """The widened network, trained: what the control learns its gates on."""
        model = self.wide.build(seed=self.seed("widened network"))
        outcome = self.trained(model, self.training.epochs)
        outcome.details |= INTERMEDIATE
        return outcome

    def trained(self, model: Network, epochs: int) -> Outcome:
        """`model` after `epochs` epochs of the paper's training."""
        trainer = self.trainer(model)
        trainer.fit(self.rates(trainer, epochs))
        return self.measured(trainer, {"widths": model.widths, "epochs": epochs})

    def trainer(self, model: Network, hooks: Hooks | Sequence[Hooks] = ()) -> Trainer:
        """A Trainer with the paper's optimiser."""
        options = self.training
        return self.context.trainer(
            model,
            self.data,
            options.batch_size,
            hooks,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
            decays=None if options.decay == "all" else weights_only(model),
            label_smoothing=options.label_smoothing,
        )

    def rates(self, trainer: Trainer, epochs: int) -> list[float]:
        """The paper's learning rates for a training of `epochs` epochs."""
        options = self.training
        return learning_rates(
            options.schedule,
            options.learning_rate,
            epochs,
            len(trainer.batches),
            drops=options.drops,
            batch_size=options.batch_size,
        )

    def measured(self, trainer: Trainer, details: dict[str, Any]) -> Outcome:
        """Scores and cost of the trainer's network, beside the base network; its weights are kept for others."""
        scores, cost = self.context.scores(trainer, self.data), self.base.cost_of(trainer.model)
        return Outcome(scores, cost, trainer.history, dict(trainer.model.state_dict()), details)

    def gates(self) -> Outcome:
        """Gates on the widened network, as it was initialised or as the needed run left it."""
        model = self.wide.build(seed=self.seed("widened network"))
        if self.context.needs:
            model.load_state_dict(self.context.needs[0].state)
        options = GateSettings.model_validate(self.run.settings["gates"])
        trainer, gates, found = learned(self.context, self.data, self.wide, model, options)
        outcome = self.measured(trainer, found | INTERMEDIATE)
        values = gates.values.detach()
        outcome.metrics |= {
            "density": density(values),
            "mean_gate": values.mean().item(),
            "gates_at_one": (values == 1).double().mean().item(),
        }
        outcome.state = {"gates": [layer.cpu() for layer in gates.layers()]}
        return outcome

    def pruned(self) -> Outcome:
        """A network whose structure meets the budget, built afresh and trained."""
        source, _, schedule = self.run.variant.rpartition("-")
        epochs = self.training.epochs
        if schedule == "b":
            epochs = self.training.budget_epochs or budget_epochs(epochs, self.run.target)
        layout, widths, facts = self.uniform() if source == "uniform" else self.searched(source)
        outcome = self.trained(layout.build(widths, seed=self.seed("network")), epochs)
        outcome.details |= {"kept_fractions": _shares(widths, layout)}
        outcome.metrics |= facts
        if source == "pfs":
            outcome.metrics |= self.search_cost()
        if source == "trained-gates":
            other = self.structure(self.context.needs[1].state["gates"]).candidate.widths
            both = [_shares(found, layout) for found in (widths, other)]
            outcome.metrics["similarity_to_random_weights"] = similarity(both)[0, 1].item()
        return outcome

    def uniform(self) -> tuple[Layout, tuple[int, ...], dict[str, Any]]:
        """The base network with equally scaled widths."""
        unit = self.run.settings["search"]["budget"]
        found = uniform_widths(self.base.widths, self.base.spends(unit), self.run.target)
        return self.base, found.widths, {"reduction": 1 - found.cost / self.base.cost()[unit]}

    def searched(self, source: str) -> tuple[Layout, tuple[int, ...], dict[str, Any]]:
        """The widened network with the widths that the gates of a source lead to."""
        if source == "random-gates":
            gates = noise_gates(self.wide.widths, self.seed("random gates"))
        elif source == "constant-gates":
            gates = [torch.ones(width) for width in self.wide.widths]
        else:
            gates = self.context.needs[0].state["gates"]
        found = self.structure(gates)
        facts = {
            "reduction": found.candidate.reduction,
            "converged": found.status == "converged",
            "tied_share": found.tied_share,
        }
        return self.wide, found.candidate.widths, facts

    def structure(self, gates: list[torch.Tensor]) -> Structure:
        """What the search makes of gates at this run's budget."""
        options = SearchSettings.model_validate(self.run.settings["search"])
        return search(
            Ranking.of(gates, options.ties, self.seed("ties")),
            self.wide.spends(options.budget),
            self.base.cost()[options.budget],
            self.run.target,
            iterations=options.iterations,
            tolerance=options.tolerance,
            min_channels=options.min_channels,
            returned=options.returned,
        )

    def block_search(self) -> Outcome:
        """The trained base network, trained on while gates learn which of its blocks to keep."""
        model = _residual(self.base)
        model.load_state_dict(self.context.needs[0].state)
        options = BlockSettings.model_validate(self.run.settings["blocks"])
        gates = bpcp.BlockGates(self.context.compute.place(model), options.weight, options.learning_rate)
        trainer = self.trainer(model, gates)
        trainer.fit(self.rates(trainer, self.training.epochs), phase="blocks")
        alpha = gates.alpha.detach().cpu()
        facts = {"epochs": self.training.epochs, "probabilities": bpcp.probability(alpha).tolist()}
        outcome = self.measured(trainer, facts | INTERMEDIATE)
        outcome.state = {"weights": outcome.state, "alpha": alpha}
        return outcome

    def bpcp(self) -> Outcome:
        """The network of the block search without its closed blocks, narrowed to the budget, and trained on."""
        options = BlockSettings.model_validate(self.run.settings["blocks"])
        search = SearchSettings.model_validate(self.run.settings["search"])
        found = self.context.needs[0].state
        model = _residual(self.base)
        model.load_state_dict(found["weights"])
        reference = self.base.cost()[search.budget]
        budget = (1 - self.run.target) * reference

        def spent(network: nn.Module) -> int:
            return self.base.cost_of(network)[search.budget]

        removed = bpcp.drop_blocks(model, found["alpha"], budget, spent)
        recovery = self.trainer(model)
        steps = options.recovery_epochs * len(recovery.batches)
        recovery.fit([options.recovery_learning_rate] * steps, phase="recovery")
        bpcp.drop_channels(model, budget, spent, search.min_channels)
        trainer = self.trainer(model)
        trainer.go_on_from(recovery.epochs_done, recovery.history)
        trainer.fit(self.rates(trainer, self.training.epochs))
        earlier = 2 * self.training.epochs + options.recovery_epochs
        facts = {"epochs": self.training.epochs, "earlier_epochs": earlier, "removed_blocks": removed}
        outcome = self.measured(trainer, facts | {"widths": model.widths})
        reduction = 1 - spent(model) / reference
        outcome.metrics |= {
            "reduction": reduction,
            "converged": abs(reduction - self.run.target) <= search.tolerance * self.run.target,
            "kept_blocks": 1 - len(removed) / len(found["alpha"]),
        }
        return outcome

    def search_cost(self) -> dict[str, float]:
        """Forward MACs of gate learning as a share of those of training the base network: here, and in the
        paper.
        """
        surplus = self.wide.cost()["macs"] / self.base.cost()["macs"]
        epochs = self.context.needs[0].record.settings["gates"]["epochs"]
        return {
            "search_cost": surplus * epochs / self.training.epochs,
            "search_cost_published": surplus * PUBLISHED_GATE_IMAGES / PUBLISHED_BASE_IMAGES,
        }


def _shares(widths: Sequence[int], layout: Layout) -> list[float]:
    return [width / full for width, full in zip(widths, layout.widths, strict=True)]


def learned(
    context: Context, data: Dataset, layout: Layout, model: Network, options: GateSettings
) -> tuple[Trainer, Gates, dict[str, Any]]:
    """Gates of `model`, all its weights frozen, as they were after the kept epoch.

    Returns the trainer with them in place, the gates, and as `epoch` and `eligible` what `kept_epoch` says.
    """
    gates = Gates(context.compute.place(model), layout.gated, options.weight, options.aim)
    trainer = context.trainer(model, data, options.batch_size, hooks=gates, optimizer=gates.optimizer())
    trainer.fit([options.learning_rate] * (options.epochs * len(trainer.batches)), phase="gates")
    densities = [density(values) for values in gates.epochs]
    for row, values, share in zip(trainer.history, gates.epochs, densities, strict=True):
        row |= {"mean_gate": values.mean().item(), "density": share}
    accuracies = [row["validation_accuracy"] for row in trainer.history]
    epoch, eligible = kept_epoch(accuracies, densities, options.aim)
    gates.values.data.copy_(gates.epochs[epoch])
    return trainer, gates, {"epoch": epoch, "eligible": eligible}


def weights_only(model: nn.Module) -> Decays:
    """Which parameters decay when batch norms, biases and depthwise convolutions are spared."""
    convolutions = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    depthwise = {f"{name}.weight" for name, convolution in convolutions if convolution.groups > 1}
    return lambda name, parameter: parameter.ndim > 1 and name not in depthwise
