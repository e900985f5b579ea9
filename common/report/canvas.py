"""What all figures share: colours, marks, type, and axes below a title and above a legend.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every variant has a marker and
a dash of its own as well, so that no figure depends on colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.report.panels import Panel

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (3, 1.2, 1, 1.2)),
    (0, (1.2, 1.2)),
    (0, (7, 1.5, 1, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (2, 2)),
)
INK, MUTED, GRID = "#222222", "#6a6a6a", "#dcdcdc"
THEMED = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}
THEMED |= {colour: f"var(--series-{i})" for i, colour in enumerate(PALETTE)}

WIDTH = 4.0
"""Inches of every figure: drawn at a telephone's width, so that its text stays readable there."""
STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "pruning-replications",
    "text.parse_math": False,  # names may have dollar signs
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
LEFT, RIGHT, BOTTOM, ROW = 0.58, 0.12, 0.44, 0.14
"""Inches beside and below axes, and of one row of a legend."""
_TITLE_WIDTH = 50
"""Characters of a title that stand in one line."""
_COLUMNS = ((13, 3), (24, 2))
"""Longest label -> columns of a legend."""


def look_of(index: int | None) -> dict[str, Any]:
    """Line2D properties of a variant's look; the reference (None) is drawn in ink."""
    if index is None:
        return {
            "color": INK,
            "marker": "_",
            "linestyle": (0, (1, 1.6)),
            "markersize": 7,
            "markeredgewidth": 1.6,
        }
    count = len(PALETTE)
    colour = PALETTE[index % count]
    return {
        "color": colour,
        "marker": MARKERS[(index + index // count) % count],
        "linestyle": DASHES[index % count],
        "markersize": 4.6,
        "markeredgewidth": 0.9,
        "markeredgecolor": colour,
        # a second round through the colours has hollow markers
        "markerfacecolor": colour if index < count else "none",
    }


def legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], columns: int, **spacing: float
) -> None:
    """A legend at the foot of a figure, in so many columns. spacing: as of matplotlib's legend."""
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.08 / WIDTH, 0.02 / figure.get_figheight()),
        ncol=columns,
        borderpad=0.1,
        borderaxespad=0.0,
        fontsize=7.5,
        **spacing,
    )


def blank(
    panel: Panel, height: float, labels: Sequence[str], looks: Sequence[int | None]
) -> tuple[Figure, float]:
    """A figure with title and legend for axes of this height; returns it and the axes' bottom, in inches."""
    longest = max((len(label) for label in labels), default=0)
    columns = next((number for most, number in _COLUMNS if longest <= most), 1)
    bottom = BOTTOM + ROW * math.ceil(len(labels) / columns) + 0.05
    figure = Figure(figsize=(WIDTH, bottom + height + top_of(panel)), facecolor="none")
    title(figure, panel)
    handles = [Line2D([], [], **look_of(look)) for look in looks]
    legend(figure, handles, labels, columns, handlelength=2.6, columnspacing=1.2, labelspacing=0.25)
    return figure, bottom


def top_of(panel: Panel) -> float:
    """Inches that the title takes, with the air below it."""
    return 0.2 + 0.16 * len(textwrap.wrap(panel.title, _TITLE_WIDTH))


def title(figure: Figure, panel: Panel) -> None:
    """Write the finding above the axes, in as many lines as it needs."""
    figure.text(
        0.08 / WIDTH,
        1 - 0.06 / figure.get_figheight(),
        textwrap.fill(panel.title, _TITLE_WIDTH),
        va="top",
        fontsize=9,
        fontweight="bold",
    )


def axes_of(figure: Figure, bottom: float, height: float, **options: Any) -> Axes:
    """Axes over the width of the figure; bottom and height in inches."""
    whole = figure.get_figheight()
    return figure.add_axes(
        (LEFT / WIDTH, bottom / whole, 1 - (LEFT + RIGHT) / WIDTH, height / whole), **options
    )


def frame(axes: Axes, values: Sequence[float]) -> None:
    """Set the limits of an accuracy axis in %: all seeds with some air; wider intervals are cut at the frame."""
    low, high = min(values), max(values)
    air = 0.06 * max(high - low, 2.0)
    axes.set_ylim(low - air, high + air)


def log_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values between two positive ones, as even as a logarithmic axis allows."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low / 1.02 <= tick <= high * 1.02]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return sorted({float(f"{tick:.2g}") for tick in np.geomspace(low, high, 5)})


def short(value: float) -> str:
    """`1.2M` for a large number."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
