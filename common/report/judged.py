"""The judged claims of a paper in the words and numbers of the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.naming import anchor
from common.records import Record
from common.report import places, runs
from common.report.evidence import Paper
from common.report.numbers import (
    amount,
    decided_interval,
    deciding_p,
    interval,
    level,
    matters,
    p_value,
    sentence,
)
from common.statistics.claims import Claim
from common.statistics.deciding import NOT_TESTED
from common.statistics.opening import COLLAPSES, MIXED, NEEDS, STRUCTURAL

KINDS = {
    NEEDS: "too few seeds: the interval still reaches into both answers; how many would decide is said",
    MIXED: "it holds in some places and not in others; each claim says where",
    COLLAPSES: "runs collapsed to chance, so that an exact test decides, which takes more seeds",
    STRUCTURAL: "more seeds alone would not decide it",
}
"""Why a claim is open, as the verdicts name it -> what that means."""
REASONS = {
    "runs are missing": "what the claim compares was not run at this scale",
    "no new seeds": "all its runs had been seen when the claim was made, and seen runs do not judge",
    "too few seeds": "no verdict comes from fewer than five pairs",
    "an arm never trained": "a network at chance from the start is no evidence",
    "a precondition is not met": "what the claim takes for granted does not hold at this scale",
    "not comparable": "the measurements cannot be compared as the claim asks",
}
"""Why a claim is not tested -> what that means. The reasons are sorted by the words of their sentences."""
_WORDS = (
    ("had been seen", "no new seeds"),
    ("no run of", "runs are missing"),
    ("was run only where", "runs are missing"),
    ("does not hold this claim", "runs are missing"),
    ("no verdict comes from fewer", "too few seeds"),
    ("is unsound", "an arm never trained"),
    ("precondition", "a precondition is not met"),
)


@dataclass(frozen=True)
class ClaimView:
    """One claim as the page shows it. Numbers are text, empty where there is none."""

    claim: Claim
    anchor: str
    verdict: str
    below: bool
    """Whether what is replicated is less than what matters."""
    kind: str
    """Why it is open or not tested, one of KINDS or REASONS; `mixed` also of a contradicted claim; else empty."""
    why: str
    """The same for a single claim: `needs 17 seeds`."""
    where: str
    """What is compared at which targets, with the verdicts where they differ."""
    stability: str
    steady: str
    """The same in a few words."""
    reason: str
    estimate: str
    interval: str
    p: str
    n: str
    matters: str
    shown_of: str
    """Which of several comparisons the numbers are of; empty for a single one."""
    test: str
    """The stated test and the metric it is about."""
    paper_value: dict[str, str] | None
    """`text` and `source` of the paper's own number."""
    comparisons: tuple[dict[str, Any], ...]

    @property
    def tested(self) -> bool:
        """Whether there is anything to show of its comparisons."""
        return any(row["estimate"] for row in self.comparisons)


def views(paper: Paper, profile: str) -> list[ClaimView]:
    """The claims of a paper in the order of its file; one that the verdicts do not hold is `not tested`.

    Deviations that were not run are left out by the verdicts, and so here.
    """
    return [
        view(claim, paper.judged.get(claim.id), paper.name, profile, paper.records)
        for claim in paper.claims
        if claim.deviation is None or claim.id in paper.judged
    ]


def view(
    claim: Claim,
    judged: Mapping[str, Any] | None,
    paper: str,
    profile: str,
    records: Sequence[Record] = (),
) -> ClaimView:
    """One claim. judged: its entry in the verdicts, None where they do not hold it. records: of the paper, as far as known."""
    if judged is None:
        judged = {
            "verdict": NOT_TESTED,
            "reason": "not judged: the verdicts file does not hold this claim",
            "comparisons": [],
        }
    found = judged["comparisons"]
    rows = [_row(claim, one, label, profile, records) for one, label in labelled(found)]
    number = judged.get("deciding", 0)
    shown = rows[number] if rows else dict.fromkeys(("estimate", "interval", "n", "label"), "")
    names = "; ".join(sorted({one["test_name"] for one in found if one["test_name"]}))
    stated = f"{claim.test}: {names}" if names else claim.test
    effects = sorted({one["matters"] for one in found if one["matters"]})
    return ClaimView(
        claim=claim,
        anchor=anchor(paper, claim.id),
        verdict=judged["verdict"],
        below=judged.get("below_what_matters", False),
        kind=kind(judged),
        why=_why(judged),
        where=places.summary(found),
        stability=_stability(judged.get("stability")),
        steady=_steady(judged.get("stability")),
        reason=sentence(judged["reason"]),
        estimate=shown["estimate"],
        interval=shown["interval"],
        p=deciding_p(judged),
        n=shown["n"] if judged["verdict"] != NOT_TESTED else "",
        matters=" or ".join(matters(claim, effect) for effect in effects),
        shown_of=shown["label"] if len(rows) > 1 else "",
        test=" ".join(
            sentence(part) for part in (stated, shared_place(found), f"metric {claim.metric}") if part
        ),
        paper_value=_paper_value(claim),
        comparisons=tuple(rows),
    )


def kind(judged: Mapping[str, Any]) -> str:
    """Why a claim is open or not tested, in kind."""
    if judged["verdict"] != NOT_TESTED:
        return judged.get("kind") or ""
    return next((name for words, name in _WORDS if words in judged["reason"]), "not comparable")


def counted(found: Sequence[ClaimView]) -> list[dict[str, Any]]:
    """The kinds of open and not tested claims that occur: verdict, name, how many, and what it means."""
    counts = Counter((one.verdict, one.kind) for one in found if one.verdict in ("open", NOT_TESTED))
    return [
        {"verdict": verdict, "kind": name, "count": counts[verdict, name], "means": means}
        for verdict, table in (("open", KINDS), (NOT_TESTED, REASONS))
        for name, means in table.items()
        if counts[verdict, name]
    ]


def _why(judged: Mapping[str, Any]) -> str:
    """`needs 17 seeds`, `mixed`, ...: why a claim is open, or holds in some places and not in others."""
    found, needs = kind(judged), judged.get("needs")
    if found == NEEDS:
        return f"needs {needs} seeds" if needs else "needs more seeds"
    return found


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


def _steady(found: Mapping[str, Any] | None) -> str:
    return f"held on {found['held']} of {found['tried']} other terms" if found and found["tried"] else ""


def _paper_value(claim: Claim) -> dict[str, str] | None:
    if claim.paper_value is None:
        return None
    given = claim.paper_value
    return {"text": f"{given.value:g} {given.unit}", "source": given.source}


def labelled(comparisons: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """Each comparison with its label, without the cell where all share one."""
    place = shared_place(comparisons)
    return [(c, c["label"].replace(f", {place}", "", 1) if place else c["label"]) for c in comparisons]


def shared_place(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """`digits, convnet`, or nothing where comparisons differ in their cell."""
    places = {(comparison["dataset"], comparison["architecture"]) for comparison in comparisons}
    return ", ".join(name for name in places.pop() if name) if len(places) == 1 else ""


def _row(
    claim: Claim, comparison: Mapping[str, Any], label: str, profile: str, records: Sequence[Record]
) -> dict[str, Any]:
    lost = [sentence(f"seed {entry['seed']} lost: {entry['reason']}") for entry in comparison["lost"]]
    checks = (("flips", "p_permutation"), ("Wilcoxon", "p_wilcoxon"), ("Page", "p_page"))
    over_images = comparison.get("over_images")  # verdicts of an earlier revision have none
    return {
        "label": label,
        "verdict": comparison["verdict"],
        "below": comparison["below_what_matters"],
        "graded": comparison["graded"] if comparison["graded"] != comparison["verdict"] else "",
        "estimate": amount(claim, comparison["estimate"]),
        "interval": decided_interval(claim, comparison),
        "over_images": interval(claim, over_images) + ": open" * (over_images["holds"] is False)
        if over_images
        else "",
        "n": str(comparison["n"]),
        "lost": lost,
        "p": _comparison_p(comparison),
        "checks": ", ".join(
            f"{name} {p_value(comparison[key])}" for name, key in checks if comparison[key] is not None
        ),
        "treatment": level(claim, comparison["treatment_mean"]),
        "control": level(claim, comparison["control_mean"]),
        "effect": "" if comparison["effect_size"] is None else f"{comparison['effect_size']:+.2f}",
        "detectable": amount(claim, comparison["detectable"], signed=False),
        "reason": sentence(comparison["reason"]),
        "unequal": runs.unequal(comparison, records),
        "filters": runs.filters(comparison, profile),
    }


def _comparison_p(comparison: Mapping[str, Any]) -> str:
    """The p of the answer that a comparison was given, before any correction; of an open one that of the claim."""
    if comparison["verdict"] == "contradicted":
        return f"{p_value(comparison['p_against'])} against" if comparison["p_against"] is not None else ""
    return p_value(comparison["p"])
