"""The judged claims of a paper in the words and numbers of the page, and the figures of what they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.report.evidence import Paper
from common.report.panels import ClaimPanel, Effect, OverviewPanel, slug
from common.statistics.claims import Claim

ROWS = 14
"""Most comparisons in one figure; more are continued in the next."""
ONE_LINE = 56
"""Characters that an axis has room for."""


@dataclass(frozen=True)
class ClaimView:
    """One claim as the page shows it. Numbers are text, empty where there is none."""

    id: str
    statement: str
    role: str
    verdict: str
    below: bool
    """Whether what is replicated is less than what matters."""
    why: str
    """In which way it is open, or mixed; empty where it is neither."""
    where: str
    """Where it holds, if not everywhere alike."""
    stability: str
    reason: str
    note: str | None
    test: str
    """The stated test and the metric it is about."""
    paper_value: dict[str, str] | None
    """`text` and `source` of the paper's own number."""
    headline: dict[str, Any]
    """The row of the comparison that decides the verdict, with the p of the claim."""
    shown_of: str
    """Which of several comparisons that is; empty for a single one."""
    comparisons: tuple[dict[str, Any], ...]


def views(paper: Paper) -> list[ClaimView]:
    """The claims of a paper in the order of its file; one that the verdicts do not hold is `not tested`."""
    return [_view(claim, paper.judged.get(claim.id)) for claim in paper.claims]


def _view(claim: Claim, judged: Mapping[str, Any] | None) -> ClaimView:
    if judged is None:
        judged = {
            "verdict": "not tested",
            "reason": "not judged: the verdicts file does not hold this claim",
            "comparisons": [],
        }
    rows = [_row(claim, comparison, label) for comparison, label in _labelled(judged["comparisons"])]
    deciding = judged.get("deciding", 0)
    place = _shared_place(judged["comparisons"])
    names = "; ".join(
        sorted({comparison["test_name"] for comparison in judged["comparisons"] if comparison["test_name"]})
    )
    stated = f"{claim.test}: {names}" if names else claim.test
    blank = dict.fromkeys(("estimate", "interval", "n"), "")
    against = judged["verdict"] == "contradicted"
    of_claim = {
        "p_holm": p_value(judged.get("p_holm")),
        "p_against": p_value(judged.get("p_against_holm")) if against else "",
    }
    return ClaimView(
        id=claim.id,
        statement=claim.statement,
        role=claim.role,
        verdict=judged["verdict"],
        below=judged.get("below_what_matters", False),
        why=_why(judged),
        where=_sentence(judged["where_it_holds"]) if judged.get("where_it_holds") else "",
        stability=_stability(judged.get("stability")),
        reason=_sentence(judged["reason"]),
        note=claim.note,
        test=" ".join(_sentence(part) for part in (stated, place, f"metric {claim.metric}") if part),
        paper_value=_paper_value(claim),
        headline=(rows[deciding] if rows else blank) | of_claim,
        shown_of=f"deciding one of {len(rows)} comparisons: {rows[deciding]['label']}"
        if len(rows) > 1
        else "",
        comparisons=tuple(rows),
    )


def _why(judged: Mapping[str, Any]) -> str:
    """`needs 17 seeds`, `mixed`, ...: why a claim is open, or holds in some places and not in others."""
    kind, needs = judged.get("kind"), judged.get("needs")
    if kind == "needs n seeds":
        return f"needs {needs} seeds" if needs else "needs more seeds"
    return kind or ""


def _stability(found: Mapping[str, Any] | None) -> str:
    """On how many other terms a verdict is the same, and what became of it on the others."""
    if not found or not found["tried"]:
        return ""
    parts = [f"the same on {found['held']}"]
    if found["reversed"]:
        parts.append(f"reversed on {len(found['reversed'])} (first: {found['first_reversal']})")
    if found["lost"]:
        parts.append(
            f"lost on {len(found['lost'])}, though so many seeds could have kept it ({', '.join(found['lost'])})"
        )
    if found["cannot tell"]:
        parts.append(f"on {len(found['cannot tell'])} so few seeds cannot tell")
    return f"Judged again on {found['tried']} other terms: {'; '.join(parts)}."


def _paper_value(claim: Claim) -> dict[str, str] | None:
    if claim.paper_value is None:
        return None
    given = claim.paper_value
    return {"text": f"{given.value:g} {given.unit}", "source": given.source}


def _labelled(comparisons: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """Each comparison with its label, without the cell where all share one."""
    place = _shared_place(comparisons)
    return [(c, c["label"].replace(f", {place}", "", 1) if place else c["label"]) for c in comparisons]


def _shared_place(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """`digits, convnet`, or nothing where comparisons differ in their cell."""
    places = {(comparison["dataset"], comparison["architecture"]) for comparison in comparisons}
    return ", ".join(name for name in places.pop() if name) if len(places) == 1 else ""


def _row(claim: Claim, comparison: Mapping[str, Any], label: str) -> dict[str, Any]:
    lost = [_sentence(f"seed {entry['seed']} lost: {entry['reason']}") for entry in comparison["lost"]]
    checks = [("Wilcoxon", comparison["p_wilcoxon"]), ("Page", comparison["p_page"])]
    share = claim.test == "sign"
    return {
        "label": label,
        "verdict": comparison["verdict"],
        "below": comparison["below_what_matters"],
        "graded": comparison["graded"] if comparison["graded"] != comparison["verdict"] else "",
        "estimate": _share(comparison["estimate"]) if share else _amount(claim, comparison["estimate"]),
        "interval": _interval(claim, comparison, share),
        "over_images": _over_images(claim, comparison),
        "n": str(comparison["n"]),
        "lost": lost,
        "p": p_value(comparison["p"]),
        "p_permutation": p_value(comparison["p_permutation"]),
        "checks": ", ".join(f"{name} {p_value(p)}" for name, p in checks if p is not None),
        "p_against": p_value(comparison["p_against"]),
        "treatment": _level(claim, comparison["treatment_mean"]),
        "control": _level(claim, comparison["control_mean"]),
        "effect": "" if comparison["effect_size"] is None else f"{comparison['effect_size']:+.2f}",
        "detectable": _amount(claim, comparison["detectable"], signed=False),
        "reason": _sentence(comparison["reason"]),
    }


def _interval(claim: Claim, comparison: Mapping[str, Any], share: bool) -> str:
    """The interval that decides, with its confidence where it has one."""
    low, high, level = comparison["low"], comparison["high"], comparison["level"]
    if level is None and low is None:
        return ""
    if share:
        text = f"{100 * low:.0f} to {_share(high)}"
    else:
        ends = "−∞" if low is None else _amount(claim, low, unit=False), _amount(claim, high) or "∞"
        text = " to ".join(ends)
    return text if level is None else f"{text} ({_confidence(level)})"


def _over_images(claim: Claim, comparison: Mapping[str, Any]) -> str:
    """The interval over seeds and test images, which decides nothing; verdicts of an earlier revision have none."""
    if not (found := comparison.get("over_images")):
        return ""
    ends = _amount(claim, found["low"], unit=False), _amount(claim, found["high"])
    return " to ".join(ends) + ": open" * (found["holds"] is False)


def _confidence(level: float) -> str:
    """`99.4 %` for ends that are one-sided at .003."""
    return f"{100 * (1 - 2 * level):.4g} %"


def p_value(p: float | None) -> str:
    """A p-value to two significant digits; what is smaller than any reader needs is bounded."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} % of cells"


def _amount(claim: Claim, value: float | None, signed: bool = True, unit: bool = True) -> str:
    """A difference, slope or ratio on the scale of the claim."""
    if value is None:
        return ""
    if claim.scale == "ratio":
        return f"{_number(value)}{'×' if unit else ''}"
    text = f"{100 * value:.2f}" if claim.scale == "points" else _number(value)
    plus = "+" if signed and value > 0 and _contrast(claim) else ""
    name = {True: " pp", False: " %"}[_contrast(claim)] if unit and claim.scale == "points" else ""
    return f"{plus}{text}{name}".replace("-", "−", 1)


def _level(claim: Claim, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if claim.scale == "points" else _number(value)


def _contrast(claim: Claim) -> bool:
    """Whether the claim is about a difference, so that zero and the sign mean something."""
    return claim.control is not None or claim.test == "trend"


def _sentence(text: str) -> str:
    """The text as a sentence of its own."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


# ---------------------------------------------------------------------------------------------- figures


def overview(found: Mapping[str, Sequence[ClaimView]]) -> OverviewPanel:
    """The verdicts of all papers in one picture."""
    rows = tuple(
        (paper, tuple((view.id, view.verdict) for view in views_)) for paper, views_ in found.items()
    )
    return OverviewPanel(
        "overview",
        "Overview",
        "Verdicts on the papers' claims",
        "Verdict on every claim, paper by paper.",
        rows,
    )


def panels(paper: Paper, full_scale: bool) -> dict[str, list[ClaimPanel]]:
    """Claim id -> figures of its comparisons, for claims that have anything to show."""
    found = {}
    for claim in paper.claims:
        comparisons = paper.judged.get(claim.id, {}).get("comparisons", [])
        effects = [
            _effect(claim, comparison, label)
            for comparison, label in _labelled(comparisons)
            if comparison["values"]
        ]
        parts = [effects[i : i + ROWS] for i in range(0, len(effects), ROWS)]
        found[claim.id] = [
            _panel(paper, claim, _shared_place(comparisons), part, (number, len(parts)), full_scale)
            for number, part in enumerate(parts, start=1)
        ]
    return found


def _panel(
    paper: Paper, claim: Claim, place: str, effects: Sequence[Effect], part: tuple[int, int], full_scale: bool
) -> ClaimPanel:
    """The figure of some of a claim's comparisons. part: its number, and that of all."""
    name, title = f"{slug(paper.name)}-claim-{slug(claim.id)}", f"{claim.id}: what it compares"
    title += f", {place}" if place else ""
    if part[1] > 1:
        name, title = f"{name}-{part[0]}", f"{title}, {part[0]} of {part[1]}"
    ratio = claim.scale == "ratio"
    one = {"sign": "cell", "trend": "seed's slope"}.get(
        claim.test, "seed" if not claim.control else "pair of equal seed"
    )
    spread = "the range of all runs" if claim.test == "count" else "the interval that decides"
    mark = "" if claim.test == "sign" else f" The large mark is the estimate, its bar {spread}."
    return ClaimPanel(
        name=name,
        heading=claim.id,
        title=title,
        caption=f"Each small point is one {one}.{mark}",
        effects=tuple(effects),
        axis=_axis(claim),
        null=(1.0 if ratio else 0.0) if _contrast(claim) else None,
        bound="claimed bound" if claim.test in ("threshold", "count") else "what matters",
        logarithmic=ratio and all(value > 0 for effect in effects for value in effect.values),
        paper_value=_drawn_paper_value(claim) if full_scale else None,
    )


def _drawn_paper_value(claim: Claim) -> float | None:
    """The paper's number in units of the figure, where it is on the same scale."""
    given = claim.paper_value
    return given.value if given and given.unit == claim.scale else None


def _axis(claim: Claim) -> str:
    metric = (
        claim.metric.removeprefix("metrics.").removeprefix("cost.").removeprefix("details.").replace("_", " ")
    )
    sides = {"ratio": "treatment / control"}.get(claim.scale, "treatment − control") if claim.control else ""
    unit = {"points": "percentage points" if _contrast(claim) else "%", "ratio": "ratio"}.get(claim.scale, "")
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

    # the reference of a sign test is a share of cells, which has no place on the axis of their values
    bounds = [] if claim.test == "sign" else [factor * value for value in comparison["reference"]]
    neutral = 1.0 if claim.scale == "ratio" else 0.0
    return Effect(
        label=label,
        verdict=comparison["verdict"],
        values=tuple(factor * value for value in comparison["values"]),
        estimate=shown(comparison["estimate"]),
        low=shown(comparison["low"]),
        high=shown(comparison["high"]),
        bounds=tuple(bound for bound in bounds if bound != neutral or not _contrast(claim)),
    )
