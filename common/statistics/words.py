"""Verdicts in words: the label of a comparison and the one sentence that gives its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from common.statistics import inference
from common.statistics.comparisons import Comparison
from common.statistics.deciding import CONTRADICTED, NOT_TESTED, OPEN, REPLICATED, VERDICTS, Judged
from common.statistics.evidence import Evidence, Why, known
from common.statistics.opening import MIXED
from common.statistics.records import SECTIONS, Quantity
from common.statistics.testing import bound_met

_PAIRED = ("superiority", "difference", "noninferiority", "equivalence")
# what follows the numbers, by test and verdict
_TAILS = {
    ("noninferiority", REPLICATED): "; not worse by what matters",
    ("noninferiority", CONTRADICTED): "; worse by more than what matters",
    ("equivalence", REPLICATED): "; equal within what matters",
    ("equivalence", CONTRADICTED): "; they differ by more than what matters",
    ("difference", CONTRADICTED): "; equal within what matters",
}


def label(comparison: Comparison) -> str:
    """What is compared, where: `slr vs ft, digits, mlp, target 0.98`."""
    points = comparison.points
    first = points[0]
    named = first.control is not None and first.control.metric != first.treatment.metric

    def side(quantities: list[Quantity | None]) -> str:
        found = dict.fromkeys(_short(quantity, comparison, named) for quantity in quantities if quantity)
        return ", ".join(found)

    text = side([point.treatment for point in points])
    if first.control:
        text += f" vs {side([point.control for point in points])}"
    if comparison.claim.test == "sign":
        return f"{text}, {len(points)} cells"
    places = [name for name in (comparison.dataset, comparison.architecture) if name]
    targets = [f"target {comparison.target:g}"] if comparison.target is not None else []
    return ", ".join([text, *places, *targets])


def reason(comparison: Comparison) -> str:
    """Why the comparison has its verdict, in one sentence with the numbers."""
    found = comparison.shown
    problem = comparison.problem or (found.problem if found else None)
    if comparison.verdict == NOT_TESTED or found is None or problem:
        return f"not tested: {problem or 'nothing was measured'}"
    lost = len(found.lost)
    tail = f"; {lost} seed{'s' * (lost > 1)} lost: {found.lost[0]['reason']}" if lost else ""
    return _numbers(comparison, found) + _conclusion(comparison, found) + tail


def claim_reason(judged: Judged, deciding: Comparison, why: Why | None) -> str:
    """Why a claim has its verdict: that of its only comparison, or where it holds and the one that decides."""
    if len(judged.comparisons) == 1:
        return reason(deciding)
    if judged.verdict == NOT_TESTED:
        return reason(deciding)
    found = Counter(comparison.verdict for comparison in judged.comparisons)
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in sorted(found))
    where = where_it_holds(judged.comparisons)
    mixed = f": {where}" if where and why and why.kind == MIXED else ""
    return (
        f"{len(judged.comparisons)} comparisons ({counts}{mixed}), decided by {label(deciding)}: "
        f"{reason(deciding)}"
    )


def where_it_holds(comparisons: Sequence[Comparison]) -> str | None:
    """`replicated at target 0.9, 0.95; open at target 0.98`, where a claim's comparisons are graded differently."""
    grades: dict[str, list[str]] = {}
    for comparison, name in zip(comparisons, _apart(comparisons), strict=True):
        grades.setdefault(comparison.graded, []).append(name)
    if len(grades) < 2:
        return None
    return "; ".join(
        f"{verdict} for {', '.join(grades[verdict])}" for verdict in VERDICTS if verdict in grades
    )


def _apart(comparisons: Sequence[Comparison]) -> list[str]:
    """What tells each comparison of a claim from the others."""
    if len({_without_target(comparison) for comparison in comparisons}) == 1:
        return [
            f"target {comparison.target:g}" if comparison.target is not None else "all"
            for comparison in comparisons
        ]
    parts = [label(comparison).split(", ") for comparison in comparisons]
    shared = set(parts[0]).intersection(*parts)
    return [" ".join(part for part in each if part not in shared) or each[0] for each in parts]


def _without_target(comparison: Comparison) -> str:
    return label(replace(comparison, target=None))


# ------------------------------------------------------------------------------------------------ names


def _name(quantity: Quantity, comparison: Comparison) -> str:
    """The variant, and what sets it apart from the comparison's cell."""
    cell = (comparison.dataset, comparison.architecture)
    apart = [
        own for own, its in zip((quantity.dataset, quantity.architecture), cell) if its and own and own != its
    ]
    # the points of a trend over targets differ in target: only a fixed one is worth naming
    targets = {point.treatment.target for point in comparison.points}
    if quantity.target is not None and quantity.target not in targets:
        apart.append(f"target {quantity.target:g}")
    return f"{quantity.variant} ({', '.join(apart)})" if apart else str(quantity.variant)


def _short(quantity: Quantity, comparison: Comparison, named: bool) -> str:
    """The name, with its metric if `named`, and with what is subtracted."""
    text = f"{_name(quantity, comparison)}{f' {_metric(quantity)}' if named else ''}"
    return f"{text} minus {_short(quantity.minus, comparison, named)}" if quantity.minus else text


def _metric(quantity: Quantity) -> str:
    head, _, rest = quantity.metric.partition(".")
    return (rest if head in SECTIONS and rest else quantity.metric).replace("_", " ")


def _side(quantity: Quantity, comparison: Comparison, other: Quantity | None = None) -> str:
    """`test accuracy of slr`, or `that of slr` beside another side with the same metric."""
    what = "that" if other and other.metric == quantity.metric and not other.minus else _metric(quantity)
    text = f"{what} of {_name(quantity, comparison)}"
    return (
        f"{text} minus {_side(quantity.minus, comparison, replace(quantity, minus=None))}"
        if quantity.minus
        else text
    )


# ---------------------------------------------------------------------------------------------- numbers


def _number(given: float | None) -> str:
    value = known(given)
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _shown(given: float | None, comparison: Comparison) -> str:
    """A value on the scale of the claim, without its unit."""
    value = known(given)
    return _number(100 * value if comparison.claim.scale == "points" else value)


def _amount(value: float | None, comparison: Comparison) -> str:
    text = _shown(value, comparison)
    if comparison.claim.scale != "points":
        return text
    return f"{text} point{'' if text in ('1', '-1') else 's'}"


def _p(given: float | None) -> str:
    value = known(given)
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def _confidence(comparison: Comparison) -> str:
    """`99.4 %`: of the interval whose ends are one-sided at the level faced."""
    share = 100 * (1 - 2 * known(comparison.level))
    digits = 0 if abs(share - round(share)) < 1e-6 else 1 if share < 99.9 else 2 if share < 99.99 else 3
    return f"{share:.{digits}f} %"


def _end(value: float | None, comparison: Comparison) -> str:
    if value is None or abs(value) == float("inf"):
        return "unbounded"
    return _shown(value, comparison)


def _interval(comparison: Comparison) -> str:
    return (
        f"{_confidence(comparison)} interval {_end(comparison.low, comparison)} to "
        f"{_end(comparison.high, comparison)}"
    )


def _evidence(comparison: Comparison, found: Evidence, *more: str) -> str:
    same = ["the same in every seed"] if len(found.values) > 1 and inference.is_constant(found.values) else []
    return f"({', '.join([*same, _interval(comparison), *_over_images(comparison), *more, *_collapsed(comparison, found)])})"


def _over_images(comparison: Comparison) -> list[str]:
    """The second interval, which decides nothing."""
    if (found := comparison.over_images) is None:
        return []
    text = f"over other test images too {_end(found.low, comparison)} to {_end(found.high, comparison)}"
    return [text + ", which leaves it open" * (found.holds is False)]


def _collapsed(comparison: Comparison, found: Evidence) -> list[str]:
    """How often runs collapsed, and what a mean of such runs hides."""
    if not found.collapsed:
        return []
    rates = str(found.collapsed["treatment"])
    if "control" in found.collapsed:
        rates += f" and {found.collapsed['control']}"
    differ = f" (McNemar {_p(found.collapsed['p'])})" if "p" in found.collapsed else ""
    middle = (
        f"median {_shown(found.median, comparison)}",
        f"interquartile mean {_amount(found.interquartile_mean, comparison)}",
    )
    return [f"{rates} of {_seeds(found.n)} collapsed{differ}", *middle]


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def _agreeing(comparison: Comparison, found: Evidence, given: float | None) -> str:
    """`9 of 10 seeds`: those whose value lies in the claimed direction from the one given."""
    neutral = known(given)
    agree = sum(comparison.sign * value > comparison.sign * neutral for value in found.values)
    return f"{agree} of {_seeds(found.n)}"


def _numbers(comparison: Comparison, found: Evidence) -> str:
    claim, first = comparison.claim, comparison.points[0]
    if claim.test in _PAIRED:
        return _paired(comparison, found)
    if claim.test == "diversity":
        return _vectors(comparison, found)
    treatment = _side(first.treatment, comparison)
    control = _side(first.control, comparison, first.treatment) if first.control else None
    if claim.test == "sign":
        agree = f"{round(known(found.estimate) * found.n)} of {found.n} cells"
        share = (
            f"{_confidence(comparison)} interval of the share {comparison.low:.2f} to {comparison.high:.2f}"
        )
        return f"{agree}: {treatment} is {claim.direction} than {control} ({share})"
    joint = " over " if claim.scale == "ratio" else " minus "
    subject = treatment + (joint + control if control else "")
    if claim.test == "count":
        bound = "at most" if claim.direction == "lower" else "at least"
        ends = (_shown(min(found.values), comparison), _shown(max(found.values), comparison))
        met = f"{bound_met(comparison, found)} of {_seeds(found.n)}"
        text = " to ".join(dict.fromkeys(ends))
        return f"{met}: {subject} is {bound} {_amount(claim.value, comparison)} (found {text})"
    if claim.test == "trend":
        return _slope(comparison, found, treatment, control)
    claimed = (
        f"claimed {'below' if claim.direction == 'lower' else 'above'} {_shown(claim.value, comparison)}"
    )
    mean = _amount(found.estimate, comparison)
    return (
        f"{_agreeing(comparison, found, claim.value)}: {subject} is {mean} on average "
        f"{_evidence(comparison, found, claimed)}"
    )


def _paired(comparison: Comparison, found: Evidence) -> str:
    claim, first = comparison.claim, comparison.points[0]
    treatment = _side(first.treatment, comparison)
    control = _side(known(first.control), comparison, first.treatment)
    ratio, estimate = claim.scale == "ratio", known(found.estimate)
    if ratio:
        relation = f"is {_number(estimate)} times {control}"
    elif estimate == 0:
        relation = f"is the same on average as {control}"
    else:
        amount = _amount(abs(estimate), comparison)
        relation = f"is {amount} {'higher' if estimate > 0 else 'lower'} than {control}"
    seeds = _seeds(found.n)
    if claim.test == "superiority":
        seeds = _agreeing(comparison, found, 1.0 if ratio else 0.0)
    return f"{seeds}: {treatment} {relation} {_evidence(comparison, found, *_matters(comparison))}"


def _matters(comparison: Comparison) -> list[str]:
    if not comparison.matters:
        return []
    if comparison.claim.scale == "ratio":
        return [f"what matters is a factor of {_number(1 + comparison.matters)}"]
    return [f"what matters is {_amount(comparison.matters, comparison)}"]


def _slope(comparison: Comparison, found: Evidence, treatment: str, control: str | None) -> str:
    claim = comparison.claim
    if claim.steps:
        treatment = f"{_metric(comparison.points[0].treatment)} over {label(comparison)}"
    axis = "the steps" if claim.steps else "the target" if claim.x == "target" else "the logit of the target"
    subject = treatment + (f" minus {control}" if control and not claim.steps else "")
    slope = known(found.estimate)
    change = (
        f"rises by {_amount(slope, comparison)}" if slope > 0 else f"falls by {_amount(-slope, comparison)}"
    )
    if abs(slope) < 1e-12:
        change = "does not change"
    page = [f"Page {_p(found.p_page)}"] if found.p_page == found.p_page else []
    return (
        f"{_agreeing(comparison, found, 0.0)}: {subject} {change} per unit of {axis} "
        f"{_evidence(comparison, found, *_matters(comparison), *page)}"
    )


def _vectors(comparison: Comparison, found: Evidence) -> str:
    first = comparison.points[0]
    names = [_name(quantity, comparison) for quantity in (first.treatment, known(first.control))]
    return (
        f"{_seeds(found.n)}: {_metric(first.treatment)} correlates {found.treatment_mean:.3f} "
        f"on average between seeds of {names[0]} and {found.control_mean:.3f} between those of "
        f"{names[1]} (Fisher's z: {_interval(comparison)})"
    )


# ------------------------------------------------------------------------------------------- conclusions


def _conclusion(comparison: Comparison, found: Evidence) -> str:
    verdict = comparison.verdict
    if comparison.why and verdict == OPEN:
        return f"; open, {comparison.why.kind}: {comparison.why.text}" + _shown_at(comparison, found)
    if verdict == REPLICATED and comparison.below:
        return "; replicated, below what matters"
    tail = _TAILS.get((comparison.claim.test, verdict), "")
    if verdict == CONTRADICTED and comparison.claim.test in ("superiority", "trend") and comparison.matters:
        neutral = 1.0 if comparison.claim.scale == "ratio" else 0.0
        far = comparison.low if comparison.sign < 0 else comparison.high
        if comparison.sign * (known(far) - neutral) >= 0:
            return "; less than what matters"
    if verdict == CONTRADICTED and not tail and comparison.claim.test != "count":
        return "; the opposite of what is claimed"
    return tail


def _shown_at(comparison: Comparison, found: Evidence) -> str:
    """The smallest effect that these seeds could have shown at the level faced."""
    if comparison.detectable is None:
        return ""
    if comparison.claim.scale == "ratio":
        effect = f"a factor of {_number(comparison.detectable)}"
    else:
        effect = _amount(comparison.detectable, comparison)
    return f"; {_seeds(found.n)} could show {effect}"
