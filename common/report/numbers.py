"""Numbers of a claim as text, on the scale that its author chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.statistics.claims import Claim
from common.statistics.deciding import CONTRADICTED, NOT_TESTED, OPEN


def p_value(p: float | None) -> str:
    """A p-value to two significant digits; what is smaller than any reader needs is bounded."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def deciding_p(judged: Mapping[str, Any]) -> str:
    """The p, after Holm's correction, of the answer that a claim was given; of an open claim both."""
    if judged["verdict"] == NOT_TESTED:
        return ""
    p, against = p_value(judged.get("p_holm")), p_value(judged.get("p_against_holm"))
    if judged["verdict"] == CONTRADICTED:
        return f"{against} against" if against else ""
    if judged["verdict"] == OPEN and against:
        return f"{p} for, {against} against"
    return p


def is_contrast(claim: Claim) -> bool:
    """Whether the claim is about a difference, so that zero and the sign mean something."""
    return claim.control is not None or claim.test == "trend"


def amount(claim: Claim, value: float | None, signed: bool = True, unit: bool = True) -> str:
    """A difference, slope or ratio; empty where there is none."""
    if value is None:
        return ""
    if claim.test == "sign":
        return f"{100 * value:.0f} %" + " of cells" * unit
    if claim.scale == "ratio":
        return f"{short(value)}{'×' if unit else ''}"
    contrast = is_contrast(claim)
    text = f"{100 * value:.2f}" if claim.scale == "points" else short(value)
    plus = "+" if signed and value > 0 and contrast else ""
    name = (" pp" if contrast else " %") if unit and claim.scale == "points" else ""
    return f"{plus}{text}{name}".replace("-", "−", 1)


def level(claim: Claim, value: float | None) -> str:
    """What one side of a comparison measures by itself."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if claim.scale == "points" else short(value)


def interval(claim: Claim, found: Mapping[str, Any]) -> str:
    """`1.19 to 3.14 pp` for `low` and `high`, where a missing end of a comparison is infinite."""
    low = "−∞" if found["low"] is None else amount(claim, found["low"], unit=False)
    return f"{low} to {amount(claim, found['high']) or '∞'}"


def decided_interval(claim: Claim, comparison: Mapping[str, Any]) -> str:
    """The interval that decides, with its confidence where it has one; empty where there is no interval.

    One that is infinite both ways, as of an exact test with too few seeds for its level, is named as such.
    """
    if comparison["level"] is None and comparison["low"] is None:
        return ""
    if comparison["low"] is None and comparison["high"] is None:
        return f"no bound ({confidence(comparison['level'])})"
    text = interval(claim, comparison)
    return text if comparison["level"] is None else f"{text} ({confidence(comparison['level'])})"


def confidence(one_sided: float) -> str:
    """`99.4 %` for ends that are one-sided at .003."""
    return f"{100 * (1 - 2 * one_sided):.4g} %"


def matters(claim: Claim, value: float | None) -> str:
    """The smallest effect that matters, as an amount; a share of a ratio is a factor."""
    if not value:
        return ""
    return f"a factor of {1 + value:.3g}" if claim.scale == "ratio" else amount(claim, value, signed=False)


def short(value: float) -> str:
    """Three significant digits, or a whole number with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def sentence(text: str) -> str:
    """The text as a sentence of its own."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
