"""Where a claim holds, in as few words as its comparisons differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.report.panels import VERDICTS, percent


def summary(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """`At 90 %: replicated vs gmp; open vs dpf.`: verdicts where they differ, and what sets the comparisons apart."""
    found = [one for one in comparisons if one["verdict"] in VERDICTS]
    if not found:
        return ""
    verdicts = [verdict for verdict in VERDICTS if any(_verdict(one) == verdict for one in found)]
    targets = {one["target"] for one in found}
    common = (
        _at("", sorted(targets)) if len(targets) == 1 and None not in targets and targets != {0.0} else ""
    )
    if len(verdicts) < 2:
        text = _listed(found, found, common)
    else:
        grouped = ([one for one in found if _verdict(one) == verdict] for verdict in verdicts)
        text = "; ".join(
            f"{verdict}: {_listed(some, found, common)}"
            for verdict, some in zip(verdicts, grouped, strict=True)
        )
    if common and len(verdicts) > 1:
        text = f"{common}, {text}"
    else:
        text = f"{text} {common}".strip()
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _verdict(comparison: Mapping[str, Any]) -> str:
    return comparison["graded"] or comparison["verdict"]


def _listed(some: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]], common: str) -> str:
    """Comparisons without what all of them share, those that differ in their target alone together."""
    apart = {
        name for name in ("treatment", "control", "place") if len({_part(one, name) for one in every}) > 1
    }
    if not apart:  # what is compared with, at least
        apart = {"control"}
    groups: dict[str, list[float]] = {}
    for one in some:
        words = [_part(one, "treatment") if "treatment" in apart else ""]
        words += [f"vs {_part(one, 'control')}"] if "control" in apart and _part(one, "control") else []
        words += [f"on {_part(one, 'place')}"] if "place" in apart and _part(one, "place") else []
        targets = groups.setdefault(" ".join(word for word in words if word), [])
        if one["target"] and not common:
            targets.append(one["target"])
    return ", ".join(_at(text, sorted(set(targets))) for text, targets in groups.items())


def _at(text: str, targets: Sequence[float]) -> str:
    if not targets:
        return text
    names = [percent(target).removesuffix(" %") for target in targets]
    return f"{text} at {', '.join(names)}\N{NO-BREAK SPACE}%".strip()


def _part(comparison: Mapping[str, Any], name: str) -> str:
    """What is treated or compared with, by its variant, or the cell."""
    if name == "place":
        return " ".join(part for part in (comparison["dataset"], comparison["architecture"]) if part)
    side = comparison[name]
    return (side["variant"] or "") if side else ""
