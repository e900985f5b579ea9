"""What commands print: columns, times, sizes. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))])
        for first, *rest in lines
    ]


def count(value: float | None) -> str:
    """A number, with commas."""
    return "?" if value is None else f"{value:,.0f}"


def time(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    if seconds is None:
        return "?"
    size, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= s or u == "s")
    return f"{seconds / size:.{0 if unit == 's' else 1}f} {unit}"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    return "?" if count is None else f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
