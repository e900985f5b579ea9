"""What was measured, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def summary(measured: Mapping[str, Any]) -> str:
    """Markdown of all steps that there are."""
    lines = ["# On a GPU: what was measured", ""]
    for name, write in (("correctness", _right), ("speed", _fast), ("stages", _real)):
        if name in measured:
            part = measured[name]
            lines += [*write(part), "", _where(part), ""]
            lines += [
                f"- stopped on an error: {job}: {reason}" for job, reason in part.get("stopped", {}).items()
            ]
    return "\n".join(lines).rstrip() + "\n"


def _where(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    rehearsed = "A rehearsal, which says nothing about the machine: " if part["quick"] else ""
    return (
        f"{rehearsed}{part['seconds']:.0f} seconds of {machine['device']}, {machine['cores']} cores of {machine['cpu']}, "
        f"Python {machine['python']}, torch {machine['torch']}, CUDA {machine['cuda'] or 'not there'}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _right(part: Mapping[str, Any]) -> Iterator[str]:
    tests = part["tests"]
    yield from ("## Right", "")
    open_ends = "" if tests["complete"] else ", not all of them executed"
    yield f"- `tests/gpu`: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped{open_ends}."
    yield from (f"  - failed: `{name}`" for name in tests["failed"])
    yield from (
        "",
        "Digits protocols with two seeds, twice here and once on the CPU; differences of accuracy in points:",
        "",
    )
    rows = []
    for paper, both in part["twice"].items():
        gap = part["against_cpu"][paper]
        spread = "" if gap["sd"] is None else f" (sd {_points(gap['sd'])}, largest {_points(gap['largest'])})"
        difference = "-" if gap["mean"] is None else f"{_points(gap['mean'])} over {gap['pairs']}{spread}"
        same = f"{both['same']} of {both['pairs']}"
        rows.append(
            [
                f"`{paper}`",
                same + "".join(f"; {name} differs" for name in both["differ"]),
                str(both["failed"]),
                difference,
            ]
        )
    yield from _table(["protocol", "pairs of runs with the same bytes", "failed", "against the CPU"], rows)
    yield from ("", "Against the same seeds on the CPU in float32 (90 % interval):", "")
    rows = [
        [
            f"{row['variant']}, {precision}",
            str(row["seeds"]),
            f"{_points(row['difference'])} ({_points(row['interval'][0])} to {_points(row['interval'][1])})",
            f"{'' if row['equivalent'] else 'not '}shown to be within {_points(row['margin'])}",
        ]
        for precision, found in part["over_seeds"].items()
        for row in found
    ]
    yield from _table(["network", "seeds", "difference of accuracy in points", "equal"], rows)


def _points(share: float) -> str:
    return f"{100 * share:.2f}"


def _fast(part: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "## Fast",
        "",
        "Microseconds of a step of each run, seconds of an epoch of CIFAR-10, share of the floor:",
        "",
    )
    networks = {name: {row["what"]: row for row in rows} for name, rows in part["networks"].items()}
    names: dict[str, None] = {}
    for rows in networks.values():
        names |= dict.fromkeys(rows)
    labels = {
        "card": "floor",
        "alone": "one run",
        "eager": "one run, eager",
        "loader": "the usual loop over a DataLoader, float32",
        "host": "the host's part, one run",
        "kernels": "kernels, one run",
    }
    table = []
    for what in sorted(names, key=lambda name: name.startswith(("together", "mixed"))):
        how, *more = what.split("-")
        runs = f"{more.pop(0)} runs at once" if how in ("together", "mixed") else ""
        pruned = ", some of them by DPF" if how == "mixed" else ""
        way = "".join(f", `{way}`" for way in more)
        label = f"{runs}{pruned}{way}, each" if runs else labels[how] + way
        table.append([label, *(_cell(rows.get(what)) for rows in networks.values())])
    yield from _table(["", *networks], table)
    yield ""
    for name, rows in networks.items():
        card = rows.get("card", {})
        if "copy" in card:
            yield f"- {name}: copies of {card['copy'] / 1e12:.2f} TB/s, products of {card['bfloat16'] / 1e12:.0f} TFLOP/s."
        yield from (f"- {name}, {what}: {row['failed']}" for what, row in rows.items() if "failed" in row)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or "failed" in row:
        return "-"
    text = f"{row['us_step']:,.0f} us"
    if "per_step" in row:
        return f"{row['per_step']:.0f}, {text}"
    if "seconds_epoch" in row:
        text += f", {row['seconds_epoch']:.2f} s"
    return text + (f", {row['share']:.0%}" if "share" in row else "")


def _real(part: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Real", "", f"Stages of the profile `{part['profile']}`:", "")
    rows = []
    for paper, stage in part["stages"].items():
        count = f"{stage['finished']} of {'?' if stage['runs'] is None else stage['runs']}"
        wrong = ", ".join(f"{number} {kind}" for kind, number in stage["failed"].items()) or "0"
        dense = "; ".join(
            f"{name}: {100 * of['mean']:.1f} % ({of['runs']})" for name, of in stage["dense"].items()
        )
        times = f"{stage['seconds']:.0f} s" if "seconds" in stage else "goes on"
        rows.append([f"`{paper}`", stage.get("ended", "goes on"), times, count, wrong, dense])
    yield from _table(
        ["stage", "ended", "took", "runs finished", "failed", "accuracy before pruning (runs)"], rows
    )
