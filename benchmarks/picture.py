"""The picture of a benchmark: every finding with its interval and its goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# kind -> title of its panel, whether its axis is logarithmic, where nothing gained and nothing lost is
PANELS: dict[str, tuple[str, bool, float | None]] = {
    "throughput": ("Images per second", True, None),
    "speed": ("Times as fast", True, 1.0),
    "share": ("Share of the ideal", False, 1.0),
    "overhead": ("Time with a method, relative to training without it", False, 1.0),
    "cost": ("Time relative to plain training", False, 1.0),
    "memory": ("Peak memory, relative", False, 1.0),
    "growth": ("Exponent of growth (1 is linear)", False, 1.0),
}
# Okabe and Ito; the words beside them say the same
COLOURS = {True: "#009e73", False: "#d55e00", None: "#0072b2"}
INK, MUTED, GRID = "#222222", "#6a6a6a", "#dcdcdc"
_WIDTH, _ROW, _HEAD, _MARGIN = 9.0, 0.27, 0.72, 0.35


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the findings of all comparisons as a PNG."""
    findings = [f for comparison in report["comparisons"].values() for f in comparison["findings"]]
    panels = {kind: [f for f in findings if f["kind"] == kind] for kind in PANELS}
    panels = {kind: rows for kind, rows in panels.items() if rows}
    heights = [_ROW * len(rows) + _HEAD for rows in panels.values()]
    height = sum(heights) + _MARGIN
    figure = Figure((_WIDTH, height), dpi=120)
    FigureCanvasAgg(figure)
    top = height - _MARGIN
    for (kind, rows), tall in zip(panels.items(), heights, strict=True):
        box = (0.41, (top - tall + 0.38) / height, 0.27, _ROW * len(rows) / height)
        _panel(figure.add_axes(box), kind, rows)
        top -= tall
    machine = report["environment"]
    title = f"{machine['device'] if machine['device'] != 'CPU' else machine['cpu']}, torch {machine['torch']}, {machine['data']}"
    figure.text(0.01, 1 - 0.2 / height, title, fontsize=8, color=MUTED)
    figure.savefig(path)


def _panel(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    title, logarithmic, neutral = PANELS[kind]
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=5)
    for place, row in enumerate(rows):
        colour, (low, high) = COLOURS[row["met"]], row["interval"]
        axes.plot([low, high], [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot(row["value"], place, "o", color=colour, markersize=5)
        if (goal := _goal(row)) is not None:
            axes.plot([goal, goal], [place - 0.38, place + 0.38], color=INK, linewidth=1.3)
        axes.annotate(
            words(row),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=INK,
            annotation_clip=False,
        )
    if neutral is not None:
        axes.axvline(neutral, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.tick_params(labelsize=8, length=0, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _goal(row: Mapping[str, Any]) -> float | None:
    return row["at_most"] if row["at_least"] is None else row["at_least"]


def words(row: Mapping[str, Any]) -> str:
    """The number with its interval; the goal and whether it is met."""
    digits = 0 if row["kind"] == "throughput" else 3 if row["kind"] == "overhead" else 2
    value, low, high = (f"{number:,.{digits}f}" for number in (row["value"], *row["interval"]))
    text = value if low == high else f"{value} ({low} to {high})"
    if (goal := _goal(row)) is None:
        return text
    verdict = {True: "met", False: "missed", None: "undecided"}[row["met"]]
    return f"{text}  goal {'≤' if row['at_least'] is None else '≥'} {goal:,g}: {verdict}"
