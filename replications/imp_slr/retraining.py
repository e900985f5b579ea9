"""How a trained network is pruned and retrained, as settings that do it."""

from __future__ import annotations

from typing import Literal

import torch

from common.core.data import Batches
from common.core.identity import stream
from common.core.pruning.masks import Allocation, Masks
from common.core.recipe import Recipe
from common.core.run import Context
from common.core.trainer import Trainer
from common.settings import Count, Rate, Sparsity, Strict
from replications.imp_slr import measures, method


class TunableSettings(Strict):
    """A tunable retraining schedule of the ablation."""

    kind: method.Tunable
    initial: Rate
    warmup_share: Sparsity = method.WARMUP_SHARE


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


class Pruning(RetrainingSettings):
    """How a trained network is pruned and retrained."""

    schedule: method.Schedule | method.Tunable = "SLR"
    epochs: Count
    cycles: Count | Literal["20%"] = 1
    """`20%` takes as many as it needs to prune that share in each."""
    allocation: Allocation = "global"
    initial: Rate | None = None
    """Start value of a tunable schedule."""
    warmup_share: Sparsity = method.WARMUP_SHARE

    def done(
        self,
        context: Context,
        trainer: Trainer,
        masks: Masks,
        sparsity: float,
        dense: Recipe,
        accuracy: float,
    ) -> tuple[list[method.Cycle], dict[str, float]]:
        """Prune and retrain the trainer's network; returns the cycles and metrics.

        dense: how it was trained. accuracy: on the test images, before pruning. Raises RunFailed.
        """
        per_epoch, test, pruned = len(trainer.batches), Batches(context.data, "test"), []
        cycles = method.cycles_needed(sparsity) if self.cycles == "20%" else self.cycles
        retraining = method.Retraining(
            self.schedule,
            method.History(dense.rates(per_epoch), dense.warmup_epochs * per_epoch),
            dense.epochs,
            initial=self.initial,
            warmup_share=self.warmup_share,
            adaptive_from=cycles - 1 if self.adaptive == "2022" else 0,
            reset_momentum=self.reset_momentum,
            recalibrate=self.recalibrate,
        )
        done = method.prune_and_retrain(
            trainer,
            masks,
            sparsity,
            method.cycle_epochs(cycles, **{self.cycle_epochs: self.epochs}),
            retraining,
            self.allocation,
            torch.Generator().manual_seed(stream(context.run.seed, "random-pruning")),
            lambda _, cycle: pruned.append(trainer.evaluate(test)["accuracy"]),
        )
        return done, {
            "pruned_accuracy": pruned[0],
            "pruning_stability": measures.pruning_stability(accuracy, pruned[0]),
            "norm_drop": done[0].norm_drop,
            "prunable_norm_drop": done[0].prunable_norm_drop,
        }
