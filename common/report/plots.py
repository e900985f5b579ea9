"""What `dvc plots` shows: verdicts on headlines, accuracies and training curves, as flat rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.report.evidence import Paper, finite
from common.report.gathering import gather, measured, used_variants
from common.statistics.claims import Claim


def files(papers: Sequence[Paper], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Name -> JSON text of each plot."""
    found = {
        "accuracy": _accuracies(papers),
        "headlines": _headlines(papers),
        "curves": _curves(papers, curves),
    }
    return {name: json.dumps(list(rows), indent=0) + "\n" for name, rows in found.items()}


def _accuracies(papers: Sequence[Paper]) -> Iterator[dict[str, Any]]:
    """Test accuracy of every finished run."""
    for paper in papers:
        for record in paper.records:
            accuracy = measured(record, "test_accuracy")
            if record.status == "ok" and accuracy is not None:
                yield record.identity | {"test_accuracy": accuracy}


def _headlines(papers: Sequence[Paper]) -> Iterator[dict[str, Any]]:
    """Estimate and verdict of every headline, in units of its metric."""
    for paper in papers:
        for claim in _headline_claims(paper):
            judged = paper.judged[claim.id]
            decided = judged["comparisons"][judged["deciding"]]
            if decided["estimate"] is not None:
                name = f"{paper.name} {claim.id}: {judged['verdict']}"
                yield {"claim": name, **{key: decided[key] for key in ("estimate", "low", "high")}}


def _headline_claims(paper: Paper) -> list[Claim]:
    return [claim for claim in paper.claims if claim.role == "headline" and claim.id in paper.judged]


def _curves(
    papers: Sequence[Paper], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Mean validation accuracy by epoch, of each variant of a headline at its highest target."""
    for paper in papers:
        variants = {name for claim in _headline_claims(paper) for name in used_variants(claim)}
        for (dataset, architecture), cell in gather(paper.records).items():
            for variant in sorted(variants.intersection(cell)):
                targets = cell[variant]
                runs = [curves.get(record.settings_hash, ()) for record in targets[max(targets)]]
                for epoch, mean in enumerate(_means(runs)):
                    line = f"{paper.name} {variant}, {dataset} {architecture}"
                    yield {"line": line, "epoch": epoch + 1, "validation_accuracy": mean}


def _means(runs: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[float | None]:
    """The mean validation accuracy of each epoch, over the runs that have it."""
    for epoch in range(max(map(len, runs), default=0)):
        values = [finite(run[epoch].get("validation_accuracy")) for run in runs if epoch < len(run)]
        known = [value for value in values if value is not None]
        yield float(f"{np.mean(known):.6g}") if known else None
