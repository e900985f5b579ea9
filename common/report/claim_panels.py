"""The figures of what a claim compares: every seed, the interval that decides, and what matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common.naming import slug
from common.report.evidence import Paper
from common.report.judged import labelled, shared_place
from common.report.numbers import amount, is_contrast
from common.report.panels import VERDICTS, ClaimPanel, Effect
from common.statistics.claims import Claim

ROWS = 14
"""Most comparisons in one figure; more are continued in the next."""
_BOUNDED = ("threshold", "count")
"""Tests whose bound is not "no effect"."""
ONE_LINE = 56
"""Characters that an axis has room for."""


def panels(paper: Paper, full_scale: bool) -> dict[str, list[ClaimPanel]]:
    """Claim id -> figures of its comparisons, for claims that have anything to show."""
    found = {}
    for claim in paper.claims:
        comparisons = paper.judged.get(claim.id, {}).get("comparisons", [])
        effects = [
            _effect(claim, comparison, label)
            for comparison, label in labelled(comparisons)
            if comparison["values"]
        ]
        parts = [effects[i : i + ROWS] for i in range(0, len(effects), ROWS)]
        if parts:
            found[claim.id] = [
                _panel(paper, claim, comparisons, part, (number, len(parts)), full_scale)
                for number, part in enumerate(parts, start=1)
            ]
    return found


def _panel(
    paper: Paper,
    claim: Claim,
    comparisons: Sequence[Mapping[str, Any]],
    effects: Sequence[Effect],
    part: tuple[int, int],
    full_scale: bool,
) -> ClaimPanel:
    """The figure of some of a claim's comparisons. part: its number, and that of all."""
    name = f"{slug(paper.name)}-claim-{slug(claim.id)}"
    name += f"-{part[0]}" if part[1] > 1 else ""
    ratio = claim.scale == "ratio"
    place = shared_place(comparisons)
    place = f"{place[:1].upper()}{place[1:]}. " if place else ""
    one = {"sign": "cell", "trend": "seed's slope"}.get(
        claim.test, "seed" if not claim.control else "pair of equal seed"
    )
    spread = "the range of all runs" if claim.test == "count" else "the interval that decides"
    mark = "" if claim.test == "sign" else f" The large mark is the estimate, its bar {spread}."
    return ClaimPanel(
        name=name,
        heading=claim.id,
        title=_finding(claim, effects, comparisons),
        caption=f"{place}Each small point is one {one}.{mark}",
        effects=tuple(effects),
        axis=_axis(claim),
        null=(1.0 if ratio else 0.0) if is_contrast(claim) else None,
        logarithmic=ratio and all(value > 0 for effect in effects for value in effect.values),
        paper_value=_drawn_paper_value(claim) if full_scale else None,
    )


def _finding(claim: Claim, effects: Sequence[Effect], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """`H1 replicated: +2.16 pp`, or `H1: replicated in 2 of 3 comparisons, open in 1; +0.2 pp to +3.1 pp`."""
    counts = Counter(effect.verdict for effect in effects)
    estimates = sorted(one["estimate"] for one in comparisons if one["estimate"] is not None)
    ends = dict.fromkeys(amount(claim, value) for value in (*estimates[:1], *estimates[-1:]))
    many = f" of {len(effects)} comparisons"
    if len(effects) == 1:
        text = f" {effects[0].verdict}"
    elif len(counts) == 1:
        text = f" {effects[0].verdict} in all{many}"
    else:
        text = f" {', '.join(f'{verdict} in {counts[verdict]}' for verdict in VERDICTS if counts[verdict])}{many}"
    return f"{claim.id}{text}: {' to '.join(ends)}" if ends else f"{claim.id}{text}"


def _drawn_paper_value(claim: Claim) -> float | None:
    """The paper's number in units of the figure, where it is on the same scale."""
    given = claim.paper_value
    return given.value if given and given.unit == claim.scale else None


def _axis(claim: Claim) -> str:
    metric = (
        claim.metric.removeprefix("metrics.").removeprefix("cost.").removeprefix("details.").replace("_", " ")
    )
    sides = {"ratio": "treatment / control"}.get(claim.scale, "treatment − control") if claim.control else ""
    contrast = is_contrast(claim)
    unit = {"points": "percentage points" if contrast else "%", "ratio": "ratio"}.get(claim.scale, "")
    if claim.test == "trend":
        step = "step" if claim.steps else "unit of target" if claim.x == "target" else "unit of logit target"
        unit = f"{unit} per {step}".strip()
        sides = f"slope of {sides}" if sides else "slope"
    text = ", ".join(part for part in (metric, sides) if part)
    joint = "\n" if len(text) + len(unit) > ONE_LINE else " "
    return f"{text}{joint}({unit})" if unit else text


def _effect(claim: Claim, comparison: Mapping[str, Any], label: str) -> Effect:
    factor = 100.0 if claim.scale == "points" else 1.0

    def shown(value: float | None) -> float | None:
        return None if value is None or claim.test == "sign" else factor * value

    bounds = [factor * value for value in comparison["reference"]] if claim.test in _BOUNDED else []
    # values of a test over cells are no seeds'
    named = claim.test != "sign" and len(comparison["seeds"]) == len(comparison["values"])
    of = [f"seed {seed}" for seed in comparison["seeds"]] if named else None
    return Effect(
        label=label,
        verdict=comparison["verdict"],
        values=tuple(factor * value for value in comparison["values"]),
        names=tuple(of or (f"value {n}" for n in range(1, len(comparison["values"]) + 1))),
        estimate=shown(comparison["estimate"]),
        low=shown(comparison["low"]),
        high=shown(comparison["high"]),
        band=_band(claim, comparison["matters"], factor),
        bounds=tuple(bounds),
    )


def _band(claim: Claim, effect: float | None, factor: float) -> tuple[float, float] | None:
    """The effects that do not matter, on either side of none."""
    if not effect or not is_contrast(claim):
        return None
    if claim.scale == "ratio":
        return 1 / (1 + effect), 1 + effect
    return -factor * effect, factor * effect
