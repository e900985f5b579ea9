"""Verdicts in words: the label of a comparison and the one sentence that gives its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from common.statistics.comparisons import Comparison, known
from common.statistics.inference import ALPHA
from common.statistics.records import SECTIONS, Quantity

_PAIRED = ("superiority", "difference", "noninferiority", "equivalence")
# what follows the numbers, by test and verdict
_TAILS = {
    ("noninferiority", "replicated"): "; not worse by the margin",
    ("noninferiority", "contradicted"): "; worse by more than the margin",
    ("noninferiority", "inconclusive"): "; neither within the margin nor beyond it for certain",
    ("equivalence", "replicated"): "; equal within the margin",
    ("equivalence", "contradicted"): "; they differ by more than the margin",
    ("equivalence", "inconclusive"): "; neither within the margin nor beyond it for certain",
    ("difference", "contradicted"): "; equal within the margin",
    ("difference", "inconclusive"): "; no difference shown",
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
    if comparison.problem:
        return f"not tested: {comparison.problem}"
    lost = len(comparison.lost)
    tail = f"; {lost} seed{'s' * (lost > 1)} lost: {comparison.lost[0]['reason']}" if lost else ""
    return _numbers(comparison) + _conclusion(comparison) + tail


def claim_reason(comparisons: Sequence[Comparison], deciding: Comparison) -> str:
    """Why a claim has its verdict: that of its only comparison, or how many hold and the one that decides."""
    if len(comparisons) == 1:
        return deciding.reason
    found = Counter(comparison.verdict for comparison in comparisons)
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in sorted(found))
    return f"{len(comparisons)} comparisons ({counts}), decided by {label(deciding)}: {deciding.reason}"


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
    if abs(value) >= 1000:
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


def _evidence(comparison: Comparison, *more: str) -> str:
    low, high = comparison.low, comparison.high
    if comparison.constant:
        found = ["the same in every seed"]
    else:
        found = [f"95% interval {_shown(low, comparison)} to {_shown(high, comparison)}"]
    return f"({', '.join([*found, *more, f'Holm {_p(comparison.p_holm)}'])})"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def _agreeing(comparison: Comparison, given: float | None) -> str:
    """`9 of 10 seeds`: those whose value lies in the claimed direction from the one given."""
    neutral = known(given)
    higher = comparison.claim.direction == "higher"
    agree = sum(value > neutral if higher else value < neutral for value in comparison.values)
    return f"{agree} of {_seeds(comparison.n)}"


def _numbers(comparison: Comparison) -> str:
    claim, first = comparison.claim, comparison.points[0]
    if claim.test in _PAIRED:
        return _paired(comparison)
    if claim.test == "diversity":
        return _vectors(comparison)
    treatment = _side(first.treatment, comparison)
    control = _side(first.control, comparison, first.treatment) if first.control else None
    if claim.test == "sign":
        agree = f"{round(known(comparison.estimate) * comparison.n)} of {comparison.n} cells"
        share = f"95% interval of the share {comparison.low:.2f} to {comparison.high:.2f}"
        evidence = f"({share}, Holm {_p(comparison.p_holm)})"
        return f"{agree}: {treatment} is {claim.direction} than {control} {evidence}"
    joint = " over " if claim.scale == "ratio" else " minus "
    subject = treatment + (joint + control if control else "")
    if claim.test == "count":
        bound = "at most" if claim.direction == "lower" else "at least"
        ends = (_shown(comparison.low, comparison), _shown(comparison.high, comparison))
        found = " to ".join(dict.fromkeys(ends))
        met = f"{comparison.bound_met()} of {_seeds(comparison.n)}"
        return f"{met}: {subject} is {bound} {_amount(claim.value, comparison)} (found {found})"
    if claim.test == "trend":
        return _slope(comparison, treatment, control)
    claimed = (
        f"claimed {'below' if claim.direction == 'lower' else 'above'} {_shown(claim.value, comparison)}"
    )
    mean = _amount(comparison.estimate, comparison)
    return (
        f"{_agreeing(comparison, claim.value)}: {subject} is {mean} on average "
        f"{_evidence(comparison, claimed)}"
    )


def _paired(comparison: Comparison) -> str:
    claim, first = comparison.claim, comparison.points[0]
    treatment = _side(first.treatment, comparison)
    control = _side(known(first.control), comparison, first.treatment)
    ratio, estimate = claim.scale == "ratio", known(comparison.estimate)
    if ratio:
        relation = f"is {_number(estimate)} times {control}"
    elif estimate == 0:
        relation = f"is the same on average as {control}"
    else:
        amount = _amount(abs(estimate), comparison)
        relation = f"is {amount} {'higher' if estimate > 0 else 'lower'} than {control}"
    seeds = (
        _agreeing(comparison, 1.0 if ratio else 0.0) if claim.test == "superiority" else _seeds(comparison.n)
    )
    margin = []
    if comparison.margin:
        margin = [f"margin {_number(comparison.margin) if ratio else _amount(comparison.margin, comparison)}"]
    return f"{seeds}: {treatment} {relation} {_evidence(comparison, *margin)}"


def _slope(comparison: Comparison, treatment: str, control: str | None) -> str:
    claim = comparison.claim
    if claim.steps:
        treatment = f"{_metric(comparison.points[0].treatment)} over {label(comparison)}"
    axis = "the steps" if claim.steps else "the target" if claim.x == "target" else "the logit of the target"
    subject = treatment + (f" minus {control}" if control and not claim.steps else "")
    slope = known(comparison.estimate)
    amount = _amount(abs(slope), comparison)
    change = "rises" if slope > 0 else "falls"
    page = [f"Page {_p(comparison.p_page)}"] if comparison.p_page == comparison.p_page else []
    return (
        f"{_agreeing(comparison, 0.0)}: {subject} {change} by {amount} per unit of {axis} "
        f"{_evidence(comparison, *page)}"
    )


def _vectors(comparison: Comparison) -> str:
    first = comparison.points[0]
    names = [_name(quantity, comparison) for quantity in (first.treatment, known(first.control))]
    return (
        f"{_seeds(comparison.n)}: {_metric(first.treatment)} correlates {comparison.treatment_mean:.3f} "
        f"on average between seeds of {names[0]} and {comparison.control_mean:.3f} between those of "
        f"{names[1]} {_evidence(comparison)}"
    )


# ------------------------------------------------------------------------------------------- conclusions


def _conclusion(comparison: Comparison) -> str:
    claim, verdict = comparison.claim, comparison.verdict
    if claim.test == "count":
        return ""
    tail = _TAILS.get((claim.test, verdict), "")
    if verdict == "inconclusive":
        return (tail or _unsettled(comparison)) + _obstacle(comparison)
    if verdict == "contradicted" and not tail:
        return f"; the opposite of what is claimed (Holm {_p(comparison.p_opposite_holm)})"
    return tail


def _unsettled(comparison: Comparison) -> str:
    if comparison.smallest_effect is None:
        return "; not settled"
    if comparison.claim.scale == "ratio":
        effect = f"a factor of {_number(comparison.smallest_effect)}"
    else:
        effect = _amount(comparison.smallest_effect, comparison)
    return f"; not settled: {_seeds(comparison.n)} could show {effect}"


def _obstacle(comparison: Comparison) -> str:
    """What kept a test from its conclusion: the smallest p that so few pairs allow, or Holm's correction."""
    test, p = comparison.claim.test, known(comparison.p)
    floor = (2 if test == "difference" else 1) / 2**comparison.n
    if (comparison.constant or test in ("sign", "diversity")) and p <= floor * (1 + 1e-9):
        units = "cells" if test == "sign" else "seeds"
        return f"; with {comparison.n} {units} this exact test cannot go below p = {floor:.2g}, before Holm"
    return f"; {_p(p)} before Holm's correction" if p < ALPHA else ""
