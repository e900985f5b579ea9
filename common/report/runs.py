"""From a number to the runs behind it: filters as MLflow's search takes them, and how far its two sides were trained alike.

`common.stage.logged` describes the params, metrics and tags that the filters name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.records import Record

_GAP = 10
"""Seeds that lie farther apart are looked for by filters of their own."""
_COST = ("epochs", "batch_size", "train")
"""Settings that say how long and on how many images a network trained, wherever they stand."""


def filters(comparison: Mapping[str, Any], profile: str) -> list[str]:
    """What finds exactly the runs of a comparison of the verdicts: one filter a side and point, more where seeds lie far apart."""
    found: dict[str, None] = {}
    for part in _parts(comparison):
        terms = [f"params.{name} {_is(_text(value))}" for name, value in part.items() if value is not None]
        for seeds in _seeds(comparison):
            found[" and ".join([*terms, f"tags.profile = '{profile}'", *seeds])] = None
    return list(found)


def unequal(comparison: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Which of the settings of this kind that both sides have differ, with their values; empty where none does.

    Arms are made to differ, so this is no error; but a reader of the numbers should know.
    """
    sides = [comparison["treatment"], comparison["control"]]
    if None in sides:
        return ""
    first, second = (_costs("", next(_of(side, records), {})) for side in sides)
    both = (name for name in first if name in second and first[name] != second[name])
    return ", ".join(f"{name} {first[name]} and {second[name]}" for name in both)


def _of(side: Mapping[str, Any], records: Sequence[Record]) -> Iterator[Mapping[str, Any]]:
    """The settings of the runs of one side of a comparison."""
    wanted = {
        name: side[name]
        for name in ("variant", "dataset", "architecture", "target")
        if side[name] is not None
    }
    return (
        record.settings
        for record in records
        if all(getattr(record, name) == value for name, value in wanted.items())
    )


def _costs(prefix: str, settings: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _costs(f"{prefix}{key}.", value)
        elif key in _COST and isinstance(value, int):
            found[f"{prefix}{key}"] = value
    return found


def _parts(comparison: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Variant, data set, architecture and target of each network that takes part."""
    points: Sequence[Mapping[str, Any]] = comparison["points"] or ({},)
    for side in (comparison["treatment"], comparison["control"]):
        for point in points:
            for part in (side, side.get("minus") if side else None):
                if part is None:
                    continue
                # what differs between the points of a trend stands at the points
                yield {
                    "variant": part["variant"] or point.get("variant"),
                    "dataset": part["dataset"],
                    "architecture": part["architecture"],
                    "target": point.get("target") if part["target"] is None else part["target"],
                }


def _seeds(comparison: Mapping[str, Any]) -> Iterator[list[str]]:
    """Bounds of the seeds that were used, and those between that were not; of each group of seeds that lie near one another."""
    groups: list[list[int]] = []
    for seed in sorted(comparison["seeds"]):
        if not groups or seed - groups[-1][-1] > _GAP:
            groups.append([])
        groups[-1].append(seed)
    for group in groups:
        between = [seed for seed in range(group[0], group[-1]) if seed not in group]
        yield [
            f"metrics.seed >= {group[0]}",
            f"metrics.seed <= {group[-1]}",
            *(f"params.seed != '{seed}'" for seed in between),
        ]
    if not groups:
        yield []


def _is(text: str) -> str:
    """The end of a filter by a value; one with quotes of both kinds is compared with any sign in their place."""
    if "'" in text and '"' in text:
        return f"LIKE '{text.replace(chr(39), '_')}'"
    return f'= "{text}"' if "'" in text else f"= '{text}'"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
