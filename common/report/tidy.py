"""What a figure shows as tidy CSV: one row a seed, with the columns named once."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator

import numpy as np

from common.report.panels import (
    ClaimPanel,
    CostPanel,
    CurvesPanel,
    ImprovementPanel,
    Panel,
    ProfilesPanel,
    TargetPanel,
)


def tidy(panel: Panel) -> str:
    """The rows of a panel; the first row names the columns."""
    rows = list(_rows(panel))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@functools.singledispatch
def _rows(panel: Panel) -> Iterator[dict[str, object]]:
    raise TypeError(f"no rows for {type(panel).__name__}")


@_rows.register
def _(panel: TargetPanel) -> Iterator[dict[str, object]]:
    for line in panel.lines:
        for point in line.points:
            for seed, y in zip(point.seeds, point.ys, strict=True):
                yield {
                    "variant": line.label,
                    "target": point.target,
                    "seed": seed,
                    "test_accuracy": f"{y:.6g}",
                }


@_rows.register
def _(panel: CostPanel) -> Iterator[dict[str, object]]:
    for line in panel.lines:
        for point in line.points:
            for seed, x, y in zip(point.seeds, point.xs, point.ys, strict=True):
                row = {"variant": line.label, "target": point.target, "seed": seed}
                yield {**row, panel.axis: f"{x:.9g}", "test_accuracy": f"{y:.6g}"}


@_rows.register
def _(panel: CurvesPanel) -> Iterator[dict[str, object]]:
    names = ("validation_accuracy", "train_loss")
    for curve in panel.curves:
        for number, seed in enumerate(curve.seeds):
            for column, epoch in enumerate(curve.epochs):
                measured = curve.values[number, :, column]
                if not np.isnan(measured).all():
                    row = {"variant": curve.label, "seed": seed, "epoch": epoch}
                    yield row | {name: f"{value:.6g}" for name, value in zip(names, measured, strict=True)}


@_rows.register
def _(panel: ClaimPanel) -> Iterator[dict[str, object]]:
    for effect in panel.effects:
        for name, value in zip(effect.names, effect.values, strict=True):
            yield {"claim": panel.heading, "comparison": effect.label, "of": name, "value": f"{value:.9g}"}


@_rows.register
def _(panel: ProfilesPanel) -> Iterator[dict[str, object]]:
    for profile in panel.profiles:
        for number, level in enumerate(panel.levels):
            yield {
                "method": profile.label,
                "accuracy": f"{level:.6g}",
                "share": f"{profile.shares[number]:.6g}",
                "low": f"{profile.lows[number]:.6g}",
                "high": f"{profile.highs[number]:.6g}",
            }


@_rows.register
def _(panel: ImprovementPanel) -> Iterator[dict[str, object]]:
    for method, _, value, low, high in panel.rows:
        ends = {"low": "" if low is None else f"{low:.6g}", "high": "" if high is None else f"{high:.6g}"}
        yield {"method": method, "against": panel.other, "probability": f"{value:.6g}", **ends}
