"""What the figures and tables show, as plain data: records gathered by cell, variant and target, in readable portions.

A cell is one (dataset, architecture). A panel is one figure; a paper with many variants is split by the claims that
use them, so that no panel holds more lines than a reader can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from common.report.evidence import Paper, finite
from common.statistics.claims import Claim

MOST_LINES = 7
MOST_EPOCHS = 100
CONFIDENCE = 0.95

Cell = tuple[str, str]
Gathered = dict[Cell, dict[str, dict[float, list[dict]]]]


@dataclass(frozen=True)
class Point:
    """Finished runs of one variant at one target: one x and one y a seed, seeds ascending."""

    target: float
    seeds: tuple[int, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """One variant of a panel. look: index of its colour, marker and dash; None for a reference such as the dense net."""

    label: str
    look: int | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """What every figure has. name: file name without suffix; heading: the figures that it stands among."""

    name: str
    heading: str
    title: str
    caption: str


@dataclass(frozen=True)
class TargetPanel(Panel):
    """Test accuracy (%) against the target; the x of the points is not used."""

    lines: tuple[Line, ...]


@dataclass(frozen=True)
class CostPanel(Panel):
    """Test accuracy (%) against a cost, on a logarithmic axis."""

    lines: tuple[Line, ...]
    axis: str
    unit: str


@dataclass(frozen=True)
class Curve:
    """One variant's training: per epoch mean and interval of each measure (rows of `MEASURES`, NaN where nothing)."""

    label: str
    look: int | None
    epochs: tuple[int, ...]
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    phases: tuple[tuple[int, str], ...]
    """(first epoch, name) of each phase."""


@dataclass(frozen=True)
class CurvesPanel(Panel):
    """Validation accuracy (%) and training loss over the epochs of the runs."""

    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Effect:
    """One comparison of a claim, in units of the panel's axis.

    values: one a pair of seeds. bounds: what the test tests against besides no effect: a margin, a claimed bound.
    """

    label: str
    verdict: str
    values: tuple[float, ...]
    estimate: float | None
    low: float | None
    high: float | None
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class ClaimPanel(Panel):
    """What a claim compares. null: where there is no effect, if anywhere; bound: what the bounds of its effects are."""

    effects: tuple[Effect, ...]
    axis: str
    null: float | None
    bound: str
    logarithmic: bool
    paper_value: float | None


@dataclass(frozen=True)
class OverviewPanel(Panel):
    """Verdict on every claim: rows of (paper, ((claim id, verdict), ...))."""

    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


VERDICTS = {"replicated": "✓", "contradicted": "✗", "inconclusive": "?", "not tested": "–"}
"""The verdicts in the order of every listing, with the sign that stands for each beside its colour."""
MEASURES = ("validation_accuracy", "train_loss")
SPREAD = "Each small point is one seed; bars are 95 % t-intervals of the mean."
COSTS = {
    "parameters": ("nonzero_parameters", "non-zero parameters", ""),
    "speed-up": ("theoretical_speedup", "theoretical speed-up (dense MACs / MACs left)", "×"),
    "macs": ("macs_left", "MACs per image", ""),
}
"""Name of a figure -> (field, axis title, unit of its ticks)."""


def measured(record: Mapping[str, Any], name: str) -> float | None:
    """A finite value from a record's metrics or cost, else None.

    `macs_left` is `sparse_macs` where the record counts them, else `macs`.
    """
    if name == "macs_left":
        left = measured(record, "sparse_macs")
        return measured(record, "macs") if left is None else left
    for part in ("metrics", "cost"):
        value = finite((record.get(part) or {}).get(name))
        if value is not None:
            return value
    return None


def gather(records: Iterable[Mapping[str, Any]]) -> Gathered:
    """Finished runs by cell, variant and target; variants in the order of the records, targets ascending."""
    gathered: Gathered = {}
    for record in records:
        if record["status"] == "ok":
            cell = gathered.setdefault((str(record["dataset"]), str(record["architecture"])), {})
            cell.setdefault(str(record["variant"]), {}).setdefault(float(record["target"]), []).append(record)
    for cell in gathered.values():
        for variant, targets in cell.items():
            cell[variant] = {t: sorted(targets[t], key=lambda record: record["seed"]) for t in sorted(targets)}
    return gathered


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of the 95 % t-interval; low and high are NaN below two values."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def references(cell: Mapping[str, Mapping[float, Any]]) -> list[str]:
    """Variants of a cell that were only run without compression; drawn as a level to compare with."""
    only_dense = [variant for variant, targets in cell.items() if set(targets) == {0.0}]
    return only_dense if len(only_dense) < len(cell) else []


def used_variants(claim: Claim) -> list[str]:
    """All variants that a claim names, in its order."""
    selections = [*claim.treatment, *(claim.control or ()), *(claim.steps or ())]
    selections += [selection.minus for selection in selections if selection.minus]
    return list(dict.fromkeys(selection.variant for selection in selections if selection.variant))


@dataclass(frozen=True)
class Portion:
    """Variants that share the panels, and the claims that need to see them together."""

    variants: tuple[str, ...]
    claims: tuple[str, ...]


def portions(variants: Sequence[str], claims: Sequence[Claim]) -> list[Portion]:
    """Split variants (a cell's, without references) into portions of at most MOST_LINES, following the claims.

    Variants that no claim names fill the portions up.
    """
    if len(variants) <= MOST_LINES:
        return [Portion(tuple(variants), ())] if variants else []
    chosen: list[tuple[list[str], list[str]]] = []
    for claim in claims:
        wanted = [variant for variant in used_variants(claim) if variant in variants]
        for part in _chunks(wanted):
            for members, ids in chosen:
                if len({*members, *part}) <= MOST_LINES:
                    members += [variant for variant in part if variant not in members]
                    ids.append(claim.id)
                    break
            else:
                chosen.append((list(part), [claim.id]))
    for variant in variants:
        if not any(variant in members for members, _ in chosen):
            room = next((members for members, _ in chosen if len(members) < MOST_LINES), None)
            if room is None:
                chosen.append(([variant], []))
            else:
                room.append(variant)
    ordered = [(sorted(members, key=variants.index), ids) for members, ids in chosen]
    return [Portion(tuple(members), tuple(dict.fromkeys(ids))) for members, ids in ordered]


def _chunks(items: Sequence[str]) -> list[Sequence[str]]:
    return [items[i : i + MOST_LINES] for i in range(0, len(items), MOST_LINES)]


def looks(variants: Sequence[str], groups: Sequence[Portion]) -> dict[str, int]:
    """A look for each variant, distinct within a portion as far as MOST_LINES looks allow."""
    given: dict[str, int] = {}
    for variant in variants:
        near = {given[v] for group in groups if variant in group.variants for v in group.variants if v in given}
        counts = [list(given.values()).count(look) for look in range(MOST_LINES)]
        free = [look for look in range(MOST_LINES) if look not in near]
        given[variant] = min(free or range(MOST_LINES), key=lambda look: (counts[look], look))
    return given


def distinct(variants: Sequence[str], wanted: Mapping[str, int]) -> dict[str, int]:
    """The wanted looks, changed only where two variants of one panel would look the same."""
    taken: dict[str, int] = {}
    for variant in variants:
        used = set(taken.values())
        look = wanted[variant]
        taken[variant] = look if look not in used else next(i for i in range(len(wanted) + MOST_LINES) if i not in used)
    return taken


def paper_panels(paper: Paper, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """All panels that a paper's records allow, cell by cell, without those of its claims."""
    panels: list[Panel] = []
    for (dataset, architecture), cell in gather(paper.records).items():
        levels = references(cell)
        compared = [variant for variant in cell if variant not in levels]
        groups = portions(compared, paper.claims)
        wanted = looks(compared, groups)
        for number, group in enumerate(groups, start=1):
            look: dict[str, int | None] = dict(distinct(group.variants, wanted))
            look |= {variant: None for variant in _levels_of(group, levels, paper.claims)}
            stem = "-".join(slug(part) for part in (paper.name, dataset, architecture))
            stem += f"-{number}" if len(groups) > 1 else ""
            place = f"{dataset} · {architecture}"
            heading = place
            if len(groups) > 1:
                heading += f", with the variants of claims {', '.join(group.claims)}" if group.claims else ", other variants"
            panels += _cell_panels(stem, place, heading, cell, look, curves)
    return panels


def _levels_of(group: Portion, levels: Sequence[str], claims: Sequence[Claim]) -> list[str]:
    named = {variant for claim in claims if claim.id in group.claims for variant in used_variants(claim)}
    return list(levels) if len(levels) == 1 else [variant for variant in levels if variant in named or not group.claims]


def _cell_panels(
    stem: str,
    place: str,
    heading: str,
    cell: Mapping[str, Mapping[float, list[dict]]],
    look: Mapping[str, int | None],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Panel]:
    lines = lines_of(cell, look)
    if not lines:
        return []
    title = f"Accuracy against target, {place}"
    compressed = any(point.target != 0 for line in lines for point in line.points)
    panels: list[Panel] = [TargetPanel(f"{stem}-target", heading, title, SPREAD, lines)] if compressed else []
    for cost in ("parameters", "speed-up"):
        if panel := cost_panel(f"{stem}-{cost}", heading, place, cost, cell, look):
            panels.append(panel)
    return panels + _curve_panels(stem, place, heading, cell, look, curves)


def lines_of(
    cell: Mapping[str, Mapping[float, list[dict]]], look: Mapping[str, int | None], cost: str | None = None
) -> tuple[Line, ...]:
    """One line a variant: test accuracy in % against a cost field, or against the target where `cost` is None."""
    lines = []
    for variant, style in look.items():
        points = []
        for target, records in cell.get(variant, {}).items():
            found = [(r["seed"], target if cost is None else measured(r, cost), measured(r, "test_accuracy")) for r in records]
            kept = [(seed, x, 100 * y) for seed, x, y in found if x is not None and y is not None]
            if kept:
                points.append(Point(target, *map(tuple, zip(*kept))))
        if points:
            lines.append(Line(variant, style, tuple(points)))
    return tuple(lines)


def cost_panel(
    name: str,
    heading: str,
    place: str,
    cost: str,
    cell: Mapping[str, Mapping[float, list[dict]]],
    look: Mapping[str, int | None],
) -> CostPanel | None:
    """Accuracy against one of COSTS, or None where it takes fewer than two values."""
    field, axis, unit = COSTS[cost]
    lines = lines_of(cell, look, field)
    values = {x for line in lines for point in line.points for x in point.xs}
    if len(values) < 2 or min(values) <= 0:
        return None
    short = {"parameters": "parameters", "speed-up": "speed-up", "macs": "MACs"}[cost]
    return CostPanel(name, heading, f"Accuracy against {short}, {place}", SPREAD, lines, axis, unit)


def _curve_panels(
    stem: str,
    place: str,
    heading: str,
    cell: Mapping[str, Mapping[float, list[dict]]],
    look: Mapping[str, int | None],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Panel]:
    chosen: dict[str, tuple[float, list[Sequence[Mapping[str, Any]]]]] = {}
    for variant in look:
        for target, records in reversed(cell.get(variant, {}).items()):
            runs = [curves[r["settings_hash"]] for r in records if len(curves.get(r.get("settings_hash"), ())) > 1]
            if runs:
                chosen[variant] = (target, runs)
                break
    if not chosen:
        return []
    targets = {target for variant, (target, _) in chosen.items() if look[variant] is not None}
    same = len(targets) == 1
    drawn = [
        _curve(variant if same or look[variant] is None else f"{variant}, {percent(target)}", look[variant], runs)
        for variant, (target, runs) in chosen.items()
    ]
    title = f"Training{f' for {percent(targets.pop())}' if same else ''}, {place}"
    caption = (
        "Mean over seeds with 95 % t-interval, at the highest target that each variant trains for by itself. "
        "A tick on a line starts a new phase. Epochs that runs share, such as those of a dense network, are drawn at "
        "the run that trained them."
    )
    return [CurvesPanel(f"{stem}-training", heading, title, caption, tuple(drawn))]


def _curve(label: str, look: int | None, runs: Sequence[Sequence[Mapping[str, Any]]]) -> Curve:
    longest = max(runs, key=len)
    epochs = list(range(0, len(longest), math.ceil(len(longest) / MOST_EPOCHS)))
    if epochs[-1] != len(longest) - 1:
        epochs.append(len(longest) - 1)
    statistics = np.full((3, len(MEASURES), len(epochs)), np.nan)
    for row, measure in enumerate(MEASURES):
        scale = 100.0 if measure.endswith("accuracy") else 1.0
        for column, epoch in enumerate(epochs):
            values = [finite(run[epoch].get(measure)) for run in runs if epoch < len(run)]
            known = [scale * value for value in values if value is not None]
            if known:
                statistics[:, row, column] = mean_interval(known)
    phases: list[tuple[int, str]] = []
    for epoch, row in enumerate(longest):
        name = str(row.get("phase", ""))
        if not phases or phases[-1][1] != name:
            phases.append((epoch + 1, name))
    means, lows, highs = statistics
    return Curve(label, look, tuple(epoch + 1 for epoch in epochs), means, lows, highs, tuple(phases))


def percent(target: float) -> str:
    """A target as text: 0.95 -> `95 %`."""
    return f"{100 * target:.4g} %"


def slug(text: str) -> str:
    """Letters, digits and dashes only, for file names and element names."""
    return "".join(c if c.isalnum() else "-" for c in text).strip("-").lower()
