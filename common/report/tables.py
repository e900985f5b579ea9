"""Tables of the page: accuracies and costs of a paper's networks, and all methods on equal footing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.records import Record
from common.report import equal_footing
from common.report.evidence import Paper
from common.report.gathering import MOST_LINES, gather, measured, reference, used_variants
from common.report.panels import percent
from common.statistics.inference import detectable


def accuracies(paper: Paper) -> list[dict[str, Any]]:
    """By cell: test accuracy (mean, standard deviation) by variant and target, and the networks' costs."""
    gathered = gather(paper.records)
    lost = Counter((r.dataset, r.architecture, r.variant, r.target) for r in paper.failed)
    named = {variant for claim in paper.claims for variant in used_variants(claim)}
    takes = (paper.environment or {}).get("measured") or {}
    tables = []
    for (dataset, architecture), cell in gathered.items():
        targets = sorted({target for found in cell.values() for target in found})
        rows = {
            variant: [
                _accuracy(found.get(target, ()), lost[dataset, architecture, variant, target])
                for target in targets
            ]
            for variant, found in cell.items()
        }
        # of many variants, those that the claims are about come first
        main = [variant for variant in rows if variant in named or variant == reference(cell)]
        main = main if main and len(rows) > MOST_LINES + 1 else list(rows)
        place = f"{dataset} · {architecture}"
        tables.append(
            {
                "place": place,
                "caption": (
                    f"{place}: test accuracy in %, mean ± standard deviation over n seeds, and the smallest "
                    "shift of that mean that n seeds could have shown (power 0.8, one-sided 5 %)."
                ),
                "targets": [percent(target) for target in targets],
                "measured": bool(takes),
                "rows": [{"variant": variant, "cells": rows[variant]} for variant in main],
                "others": [
                    {"variant": variant, "cells": rows[variant]} for variant in rows if variant not in main
                ],
                "costs": [
                    {
                        "variant": variant,
                        "target": percent(target),
                        "values": _costs(records) + (_on_machine(records, takes) if takes else []),
                    }
                    for variant, found in cell.items()
                    for target, records in found.items()
                ],
            }
        )
    return tables


def _accuracy(records: Sequence[Record], lost: int) -> dict[str, str] | None:
    values = [100 * value for record in records if (value := measured(record, "test_accuracy")) is not None]
    if not values and not lost:
        return None
    note = f"n {len(values)}" + (f", {lost} failed" if lost else "")
    if len(values) > 1:
        note += f", detects {detectable(len(values)) * float(np.std(values, ddof=1)):.2g}"
    return {"value": _mean_sd(values), "note": note}


def _mean_sd(values: Sequence[float]) -> str:
    """`mean ± standard deviation`, as far as there are enough values."""
    mean = f"{np.mean(values):.2f}" if values else "–"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def _costs(records: Sequence[Record]) -> list[str]:
    shown = []
    for name, form in (
        ("parameters", "{:,.0f}"),
        ("nonzero_parameters", "{:,.0f}"),
        ("compression", "{:.2f}×"),
        ("macs_left", "{:,.0f}"),
        ("theoretical_speedup", "{:.2f}×"),
    ):
        known = [value for record in records if (value := measured(record, name)) is not None]
        shown.append(form.format(sum(known) / len(known)) if known else "–")
    return shown


def _on_machine(records: Sequence[Record], takes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the network of the seed that was measured takes, beside the dense one: time of one image, and its file."""
    found = next((takes[r.settings_hash] for r in records if r.settings_hash in takes), None)
    if found is None:
        return ["–", "–", "–"]
    faster = found["dense_milliseconds"] / found["milliseconds"]
    return [
        f"{found['milliseconds']:.3g} ms, {faster:.2f}×",
        f"{found['bytes']:,.0f}",
        f"{found['compressed_bytes']:,.0f}",
    ]


def footing(found: equal_footing.Footing) -> dict[str, Any]:
    """Ranks, probabilities of improvement and costs of all methods of one cell."""
    costs = {
        "training MACs": [row.training_macs for row in found.rows],
        "seconds a run": [row.seconds for row in found.rows],
    }
    costs = {name: values for name, values in costs.items() if any(value is not None for value in values)}
    few = found.seeds < equal_footing.FEWEST_SEEDS
    return {
        "place": found.place,
        "targets": [percent(target) for target in found.targets],
        "costs": list(costs),
        "caption": (
            "Test accuracy in %, mean ± standard deviation; below, n and the mean rank among all methods on "
            "the seeds that all of them finished (1 is best)."
        ),
        "improvement_caption": (
            "Probability that a run of the row's method beats one of the column's, averaged over the "
            "operating points, with 95 % bootstrap interval over seeds, not corrected for many pairs."
            + (" Too few common seeds for intervals." if few else "")
        ),
        "rows": [
            {
                "method": row.method,
                "cells": [_footing_cell(row, target) for target in found.targets],
                "rank": "–" if row.rank is None else f"{row.rank:.2f}",
                "costs": [
                    "–" if values[number] is None else f"{values[number]:.4g}" for values in costs.values()
                ],
                "improvements": [_improvement(cell) for cell in found.improvements[number]],
            }
            for number, row in enumerate(found.rows)
        ],
    }


def _footing_cell(row: equal_footing.Row, target: float) -> dict[str, str]:
    values = row.accuracies.get(target, [])
    rank = f", rank {row.ranks[target]:.2f}" if target in row.ranks else ""
    return {"value": _mean_sd(values), "note": f"n {len(values)}{rank}"}


def _improvement(cell: equal_footing.Improvement | None) -> dict[str, str]:
    if cell is None:
        return {"value": "", "note": ""}
    return {
        "value": f"{cell.value:.2f}",
        "note": "" if cell.low is None else f"{cell.low:.2f} to {cell.high:.2f}",
    }
