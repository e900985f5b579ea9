"""Where a claim holds, in as few words as its comparisons differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.report.panels import VERDICTS, percent


def summary(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """`Replicated: at 90 %; open: vs gmp at 98 %.`: verdicts where they differ, with what sets the comparisons apart."""
    found = [one for one in comparisons if one["verdict"] in VERDICTS]
    if not found:
        return ""
    every = [_parts(one) for one in found]
    verdicts = [verdict for verdict in VERDICTS if any(_verdict(one) == verdict for one in found)]
    if len(verdicts) == 1:
        text = _listed(every, set())
    else:
        # what all comparisons share is left to the claim's statement, but for the target
        shared = {number for number in range(3) if len({parts[number] for parts in every}) == 1}
        groups = (
            [parts for one, parts in zip(found, every, strict=True) if _verdict(one) == v] for v in verdicts
        )
        text = "; ".join(
            f"{verdict}: {_listed(some, shared | _whole(some, every))}"
            for verdict, some in zip(verdicts, groups, strict=True)
        )
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _verdict(comparison: Mapping[str, Any]) -> str:
    return comparison["graded"] or comparison["verdict"]


def _parts(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    """Variant, control, cell and target of a comparison, empty where it has none."""
    sides = [(comparison[side] or {}).get("variant") or "" for side in ("treatment", "control")]
    place = " ".join(part for part in (comparison["dataset"], comparison["architecture"]) if part)
    return (*sides, place, percent(comparison["target"]) if comparison["target"] else "")


def _distinct(some: Sequence[tuple[str, ...]], number: int) -> list[str]:
    return list(dict.fromkeys(parts[number] for parts in some))


def _whole(some: Sequence[tuple[str, ...]], every: Sequence[tuple[str, ...]]) -> set[int]:
    """The parts in which a group takes all that there is, with all of its other parts."""
    if not _is_grid(some):
        return set()
    whole = {number for number in range(4) if set(_distinct(some, number)) == set(_distinct(every, number))}
    return whole if len(_distinct(every, 3)) > 1 else whole - {3}


def _is_grid(some: Sequence[tuple[str, ...]]) -> bool:
    """Whether these are all combinations of their pairs, cells and targets."""
    pairs = {parts[:2] for parts in some}
    return len(set(some)) == len(pairs) * len(_distinct(some, 2)) * len(_distinct(some, 3))


def _listed(some: Sequence[tuple[str, ...]], left_out: set[int]) -> str:
    """All comparisons of a group at once where they are a grid, else those that differ in their target alone together."""
    if _is_grid(some):
        groups = [some]
    else:
        groups = [
            [parts for parts in some if parts[:3] == first] for first in dict.fromkeys(p[:3] for p in some)
        ]
    return ", ".join(_words(group, left_out) for group in groups)


def _words(group: Sequence[tuple[str, ...]], left_out: set[int]) -> str:
    treatments, controls, places, targets = (
        [] if number in left_out else [part for part in _distinct(group, number) if part]
        for number in range(4)
    )
    words = [", ".join(treatments)] if len(treatments) > 1 or (left_out and treatments) else []
    # several treatments with a control each: which is which, the claim's statement says
    words += [f"vs {', '.join(controls)}"] if controls and not len(treatments) == len(controls) > 1 else []
    # a single cell is said of the whole paper already
    words += [f"on {', '.join(_cells(places))}"] if len(places) > 1 or (left_out and places) else []
    if targets:
        words.append(f"at {', '.join(target.removesuffix(' %') for target in targets)}\N{NO-BREAK SPACE}%")
    return " ".join(words) or "everywhere"


def _cells(places: Sequence[str]) -> list[str]:
    """`digits mlp, vgg` for two networks on one data set."""
    networks: dict[str, list[str]] = {}
    for place in places:
        data, _, network = place.partition(" ")
        networks.setdefault(data, []).append(network)
    return [f"{data} {', '.join(found)}".strip() for data, found in networks.items()]
