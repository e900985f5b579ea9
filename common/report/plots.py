"""What `dvc plots` shows: verdicts on headlines, accuracies and training curves, as flat rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.report.evidence import Paper, finite
from common.report.gathering import gather, measured


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
    """Every seed of every headline's comparisons, in units of the metric, with the verdict on the claim."""
    for paper in papers:
        for claim in paper.claims:
            judged = paper.judged.get(claim.id)
            if claim.role != "headline" or judged is None:
                continue
            for comparison in judged["comparisons"]:
                for value in comparison["values"]:
                    yield {
                        "claim": f"{paper.name} {claim.id}: {judged['verdict']}",
                        "comparison": comparison["label"],
                        "value": value,
                    }


def _curves(
    papers: Sequence[Paper], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Mean validation accuracy by epoch, of each variant at its highest target."""
    for paper in papers:
        for (dataset, architecture), cell in gather(paper.records).items():
            for variant, targets in cell.items():
                runs = [curves.get(record.settings_hash, ()) for record in targets[max(targets)]]
                for epoch in range(max(map(len, runs), default=0)):
                    values = [
                        finite(run[epoch].get("validation_accuracy")) for run in runs if epoch < len(run)
                    ]
                    known = [value for value in values if value is not None]
                    if known:
                        line = f"{paper.name} {variant}, {dataset} {architecture}"
                        yield {
                            "line": line,
                            "epoch": epoch,
                            "validation_accuracy": float(f"{np.mean(known):.6g}"),
                        }
