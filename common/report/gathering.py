"""Which panels a paper's records make: gathered by cell, variant and target, in readable portions.

A cell is one (dataset, architecture). A paper with many variants is split by the claims that use them: no
panel holds more lines than a reader can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from common.naming import slug
from common.records import Record
from common.report import findings
from common.report.evidence import Paper, finite
from common.report.panels import (
    CostPanel,
    Curve,
    CurvesPanel,
    Line,
    Panel,
    Point,
    TargetPanel,
    mean_interval,
    percent,
)
from common.statistics.claims import Claim

MOST_LINES = 7
MOST_EPOCHS = 100

Targets = dict[float, list[Record]]
"""Target -> finished runs of one variant, by seed."""
Gathered = dict[tuple[str, str], dict[str, Targets]]
"""(dataset, architecture) -> variant -> its targets."""
Looks = Mapping[str, int | None]
Curves = Mapping[str, Sequence[Mapping[str, Any]]]
MEASURES = ("validation_accuracy", "train_loss")
COLLAPSED = 0.1
"""Share of the way from chance to the best network up to which a run is collapsed."""
COSTS = {
    "parameters": ("nonzero_parameters", "non-zero parameters", ""),
    "speed-up": ("theoretical_speedup", "theoretical speed-up (dense MACs / MACs left)", "×"),
    "macs": ("macs_left", "MACs per image", ""),
}
"""Name of a figure -> (field, axis title, unit of its ticks)."""


def measured(record: Record, name: str) -> float | None:
    """A finite value from a record's metrics or cost, else None.

    `macs_left` is `sparse_macs` where the record counts them, else `macs`.
    """
    if name == "macs_left":
        left = measured(record, "sparse_macs")
        return measured(record, "macs") if left is None else left
    for part in (record.metrics, record.cost):
        value = finite(part.get(name))
        if value is not None:
            return value
    return None


def gather(records: Iterable[Record]) -> Gathered:
    """Finished runs by cell, variant and target; variants in the order of the records, targets ascending."""
    gathered: Gathered = {}
    for record in records:
        if record.status == "ok":
            cell = gathered.setdefault((record.dataset, record.architecture), {})
            cell.setdefault(record.variant, {}).setdefault(record.target, []).append(record)
    for cell in gathered.values():
        for variant, targets in cell.items():
            cell[variant] = {t: sorted(targets[t], key=attrgetter("seed")) for t in sorted(targets)}
    return gathered


def reference(cell: Mapping[str, Targets]) -> str | None:
    """The variant of a cell that was run for all seeds but never compressed: a level to compare with.

    None where there is no such variant, or more than one.
    """
    seeds = {
        variant: len({r.seed for runs in targets.values() for r in runs}) for variant, targets in cell.items()
    }
    dense = [v for v, targets in cell.items() if set(targets) == {0.0} and seeds[v] == max(seeds.values())]
    return dense[0] if len(dense) == 1 < len(cell) else None


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
    """Split a cell's variants, without its reference, into portions of at most MOST_LINES, by the claims.

    Of more variants than that, those that no claim names (runs that tune something, for instance) are left
    out, unless no claim names any.
    """
    if len(variants) <= MOST_LINES:
        return [Portion(tuple(variants), ())] if variants else []
    chosen: list[tuple[list[str], list[str]]] = []
    for claim in claims:
        for part in _chunks([variant for variant in used_variants(claim) if variant in variants]):
            for members, ids in chosen:
                if len({*members, *part}) <= MOST_LINES:
                    members += [variant for variant in part if variant not in members]
                    ids.append(claim.id)
                    break
            else:
                chosen.append((list(part), [claim.id]))
    if not chosen:
        return [Portion(tuple(part), ()) for part in _chunks(variants)]
    ordered = [(sorted(members, key=variants.index), ids) for members, ids in chosen]
    return [Portion(tuple(members), tuple(dict.fromkeys(ids))) for members, ids in ordered]


def _chunks(items: Sequence[str]) -> list[Sequence[str]]:
    return [items[i : i + MOST_LINES] for i in range(0, len(items), MOST_LINES)]


def looks(variants: Sequence[str], groups: Sequence[Portion]) -> dict[str, int]:
    """A look for each variant, distinct within a portion as far as MOST_LINES looks allow."""
    given: dict[str, int] = {}
    for variant in variants:
        near = {
            given[v] for group in groups if variant in group.variants for v in group.variants if v in given
        }
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
        taken[variant] = look if look not in used else next(i for i in range(len(variants)) if i not in used)
    return taken


def paper_panels(paper: Paper, curves: Curves) -> list[Panel]:
    """All panels that a paper's records allow, cell by cell, without those of its claims."""
    panels: list[Panel] = []
    for (dataset, architecture), cell in gather(paper.records).items():
        level = reference(cell)
        compared = [variant for variant in cell if variant != level]
        groups = portions(compared, paper.claims)
        wanted = looks(compared, groups)
        for number, group in enumerate(groups, start=1):
            look: dict[str, int | None] = dict(distinct(group.variants, wanted))
            look |= {level: None} if level else {}
            stem = "-".join(slug(part) for part in (paper.name, dataset, architecture))
            stem += f"-{number}" if len(groups) > 1 else ""
            place = f"{dataset} · {architecture}"
            heading = place
            if len(groups) > 1:
                heading += (
                    f", variants of claims {', '.join(group.claims)}" if group.claims else f", part {number}"
                )
            panels += _cell_panels(stem, place, heading, cell, look, curves)
    return panels


def _cell_panels(
    stem: str, place: str, heading: str, cell: Mapping[str, Targets], look: Looks, curves: Curves
) -> list[Panel]:
    lines = lines_of(cell, look)
    if not lines:
        return []
    centre, caption = spread(cell, look)
    compressed = any(point.target != 0 for line in lines for point in line.points)
    panels: list[Panel] = []
    if compressed:
        title = findings.at_targets(lines, centre, place)
        panels.append(TargetPanel(f"{stem}-target", heading, title, caption, lines, centre))
    for cost in ("parameters", "speed-up"):
        if panel := cost_panel(f"{stem}-{cost}", heading, place, cost, cell, look):
            panels.append(panel)
    return panels + _curve_panels(stem, place, heading, cell, look, curves)


def spread(cell: Mapping[str, Targets], look: Looks) -> tuple[str, str]:
    """What stands for the seeds of a point, and the words that say so: where runs collapsed, a mean says little."""
    shown = [r for variant in look for runs in cell.get(variant, {}).values() for r in runs]
    accuracies = {id(r): a for r in shown if (a := measured(r, "test_accuracy")) is not None}
    chance = next((r.chance for r in shown if r.chance is not None), None)
    if chance is not None and accuracies:
        bound = chance + COLLAPSED * (max(accuracies.values()) - chance)
        if min(accuracies.values()) <= bound:
            return (
                "interquartile mean",
                "Each small point is one seed. Runs collapsed, so that lines are interquartile means, with 95 % "
                "bootstrap intervals.",
            )
    return "mean", "Each small point is one seed; lines are means, bars 95 % t-intervals."


def lines_of(cell: Mapping[str, Targets], look: Looks, cost: str | None = None) -> tuple[Line, ...]:
    """One line a variant: test accuracy in % against a cost field, or the target where `cost` is None."""
    lines = []
    for variant, style in look.items():
        points = []
        for target, records in cell.get(variant, {}).items():
            found = [
                (target if cost is None else measured(r, cost), measured(r, "test_accuracy"), r.seed)
                for r in records
            ]
            kept = [(x, 100 * y, seed) for x, y, seed in found if x is not None and y is not None]
            if kept:
                xs, ys, seeds = zip(*kept, strict=True)
                points.append(Point(target, xs, ys, seeds))
        if points:
            lines.append(Line(variant, style, tuple(points)))
    return tuple(lines)


def cost_panel(
    name: str, heading: str, place: str, cost: str, cell: Mapping[str, Targets], look: Looks
) -> CostPanel | None:
    """Accuracy against one of COSTS, or None where it takes fewer than two values."""
    field, axis, unit = COSTS[cost]
    lines = lines_of(cell, look, field)
    values = {x for line in lines for point in line.points for x in point.xs}
    if len(values) < 2 or min(values) <= 0:
        return None
    centre, caption = spread(cell, look)
    title = findings.at_costs(lines, centre, cost, place)
    return CostPanel(name, heading, title, caption, lines, centre, axis, unit)


def _curve_panels(
    stem: str, place: str, heading: str, cell: Mapping[str, Targets], look: Looks, curves: Curves
) -> list[Panel]:
    chosen: dict[str, tuple[float, dict[int, Sequence[Mapping[str, Any]]]]] = {}
    for variant in look:
        for target, records in reversed(cell.get(variant, {}).items()):
            found = {r.seed: curves.get(r.settings_hash, ()) for r in records}
            if runs := {seed: run for seed, run in found.items() if len(run) > 1}:
                chosen[variant] = (target, runs)
                break
    if not chosen:
        return []
    targets = {target for variant, (target, _) in chosen.items() if look[variant] is not None}
    same = len(targets) == 1
    drawn = [
        _curve(
            variant if same or look[variant] is None else f"{variant}, {percent(target)}", look[variant], runs
        )
        for variant, (target, runs) in chosen.items()
    ]
    title = findings.of_training(drawn, percent(targets.pop()) if same else None, place)
    caption = (
        "Mean over seeds with 95 % t-interval, at the highest target that each variant trains for by itself. "
        f"A tick on a line starts a new phase{_phases(drawn)}. Epochs that runs share, such as those of a "
        "dense network, are drawn at the run that trained them."
    )
    return [CurvesPanel(f"{stem}-training", heading, title, caption, tuple(drawn))]


def _phases(curves: Sequence[Curve]) -> str:
    """The names of the phases in brackets, as far as few enough orders of phases occur."""
    orders = dict.fromkeys(", ".join(dict.fromkeys(name for _, name in curve.phases)) for curve in curves)
    named = [order for order in orders if ", " in order]
    return f" ({'; or '.join(named)})" if 0 < len(named) <= 3 else ""


def _curve(label: str, look: int | None, runs: Mapping[int, Sequence[Mapping[str, Any]]]) -> Curve:
    """runs: the rows of each seed's epochs."""
    longest = max(runs.values(), key=len)
    epochs = list(range(0, len(longest), math.ceil(len(longest) / MOST_EPOCHS)))
    if epochs[-1] != len(longest) - 1:
        epochs.append(len(longest) - 1)
    values = np.full((len(runs), len(MEASURES), len(epochs)), np.nan)
    for number, run in enumerate(runs.values()):
        for row, measure in enumerate(MEASURES):
            scale = 100.0 if measure.endswith("accuracy") else 1.0
            for column, epoch in enumerate(epochs):
                if epoch < len(run) and (value := finite(run[epoch].get(measure))) is not None:
                    values[number, row, column] = scale * value
    statistics = np.full((3, *values.shape[1:]), np.nan)
    for place in np.ndindex(values.shape[1:]):
        known = values[:, *place][~np.isnan(values[:, *place])]
        if len(known):
            statistics[:, *place] = mean_interval(known.tolist())
    phases: list[tuple[int, str]] = []
    for epoch, measurements in enumerate(longest):
        name = str(measurements.get("phase", ""))
        if not phases or phases[-1][1] != name:
            phases.append((epoch + 1, name))
    means, lows, highs = statistics
    shown = tuple(epoch + 1 for epoch in epochs)
    return Curve(label, look, shown, tuple(runs), values, means, lows, highs, tuple(phases))
