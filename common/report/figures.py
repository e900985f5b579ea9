"""Panels become figures: SVG and PNG with equal bytes on every drawing, and SVG text to set inside a page.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every variant has a marker and
a dash of its own as well, so that no figure depends on colour.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from common.report.panels import (
    VERDICTS,
    ClaimPanel,
    CostPanel,
    CurvesPanel,
    Line,
    OverviewPanel,
    Panel,
    TargetPanel,
    mean_interval,
    slug,
)
from common.report.svg import compact, inline

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
PNG_DPI = 144
_STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "pruning-replications",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
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
_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 0.58, 0.12, 0.36, 0.44, 0.15
_WIDE_LABEL = 22


@dataclass(frozen=True)
class Drawn:
    """A finished figure: file contents, and the SVG as it stands inside a page."""

    name: str
    heading: str
    caption: str
    svg: str
    png: bytes
    inline: str


def draw(panel: Panel) -> Drawn:
    """Draw one panel. Pure: the same panel gives the same bytes."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(panel)
        svg, png = io.StringIO(), io.BytesIO()
        FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    text = compact(svg.getvalue())
    return Drawn(
        panel.name,
        panel.heading,
        panel.caption,
        text,
        png.getvalue(),
        inline(text, panel.name, panel.title, THEMED),
    )


@functools.singledispatch
def _figure(panel: Panel) -> Figure:
    raise TypeError(f"no figure for {type(panel).__name__}")


# ---------------------------------------------------------------------------------------------- looks


def _look(index: int | None) -> dict:
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


def _canvas(
    panel: Panel, height: float, labels: Sequence[str], looks: Sequence[int | None]
) -> tuple[Figure, float]:
    """A figure with title and legend for axes of this height; returns it and the axes' bottom, in inches."""
    columns = 2 if max((len(label) for label in labels), default=0) <= _WIDE_LABEL and len(labels) > 1 else 1
    bottom = _BOTTOM + _ROW * math.ceil(len(labels) / columns) + 0.05
    figure = Figure(figsize=(WIDTH, bottom + height + _TOP))
    _title(figure, panel)
    handles = [Line2D([], [], **_look(look)) for look in looks]
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.08 / WIDTH, 0.02 / figure.get_figheight()),
        ncol=columns,
        handlelength=3.0,
        columnspacing=1.2,
        labelspacing=0.3,
        borderpad=0.1,
        borderaxespad=0.0,
    )
    return figure, bottom


def _title(figure: Figure, panel: Panel) -> None:
    # long titles are set smaller rather than cut
    size = min(9.0, 420 / len(panel.title))
    figure.text(
        0.08 / WIDTH,
        1 - 0.08 / figure.get_figheight(),
        panel.title,
        va="top",
        fontsize=size,
        fontweight="bold",
    )


def _axes(figure: Figure, bottom: float, height: float, **options) -> Axes:
    whole = figure.get_figheight()
    return figure.add_axes(
        (_LEFT / WIDTH, bottom / whole, 1 - (_LEFT + _RIGHT) / WIDTH, height / whole), **options
    )


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Limits of an accuracy axis in %: all seeds with some air; wider intervals are cut at the frame."""
    low, high = min(values), max(values)
    air = 0.06 * max(high - low, 2.0)
    axes.set_ylim(low - air, high + air)


# ---------------------------------------------------------------------------------------------- accuracy


def _position(target: float) -> float:
    """Place of a target on the axis: halving what remains is one step, which opens up the high end."""
    return -math.log2(1 - target)


@_figure.register
def _(panel: TargetPanel) -> Figure:
    figure, bottom = _canvas(
        panel, 2.45, [line.label for line in panel.lines], [line.look for line in panel.lines]
    )
    axes = _axes(figure, bottom, 2.45)
    targets = sorted({point.target for line in panel.lines for point in line.points})
    place = _position if all(0 <= target < 1 for target in targets) else float
    ticks = [place(target) for target in targets]
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    # side by side, and the seeds of each side by side too, so that nothing hides
    step = min(0.09, 0.45 * min(gaps, default=1.0) / len(panel.lines))
    compared = [line for line in panel.lines if line.look is not None]
    for line in panel.lines:
        shift = 0.0 if line.look is None else step * (compared.index(line) - (len(compared) - 1) / 2)
        xs = [place(point.target) + shift for point in line.points]
        spread = [step * np.linspace(-0.4, 0.4, len(point.ys)) for point in line.points]
        _seeds(axes, line, [(x + beside).tolist() for x, beside in zip(xs, spread)])
        _means(axes, line, xs)
        if line.look is None and len(line.points) == 1 and len(targets) > 1:
            axes.axhline(
                float(np.mean(line.points[0].ys)),
                color=INK,
                linewidth=0.8,
                linestyle=(0, (1, 1.6)),
                zorder=1.5,
            )
    _frame(axes, [y for line in panel.lines for point in line.points for y in point.ys])
    axes.set_xticks(ticks, _thinned(ticks, [f"{100 * target:.4g}" for target in targets]))
    axes.set_xlim(ticks[0] - 0.3, ticks[-1] + 0.3)
    axes.set_xlabel("target: share removed (%), spaced by what remains")
    axes.set_ylabel("test accuracy (%)")
    return figure


def _thinned(ticks: Sequence[float], labels: Sequence[str]) -> list[str]:
    """The labels without those that would touch their neighbour; the highest target keeps its label."""
    room = 0.075 * (ticks[-1] - ticks[0] + 0.6)
    shown, last = [], math.inf
    for tick, label in zip(reversed(ticks), reversed(labels)):
        shown.append(label if last - tick > room else "")
        last = tick if shown[-1] else last
    return shown[::-1]


@_figure.register
def _(panel: CostPanel) -> Figure:
    figure, bottom = _canvas(
        panel, 2.45, [line.label for line in panel.lines], [line.look for line in panel.lines]
    )
    axes = _axes(figure, bottom, 2.45, xscale="log")
    for line in panel.lines:
        _seeds(axes, line, [point.xs for point in line.points])
        _means(axes, line, [math.exp(np.mean(np.log(point.xs))) for point in line.points])
    xs = [x for line in panel.lines for point in line.points for x in point.xs]
    ticks = _log_ticks(min(xs), max(xs))
    axes.set_xticks(ticks, [f"{_short(tick)}{panel.unit}" for tick in ticks])
    axes.minorticks_off()
    air = (max(xs) / min(xs)) ** 0.06
    axes.set_xlim(min(xs) / air, max(xs) * air)
    _frame(axes, [y for line in panel.lines for point in line.points for y in point.ys])
    axes.set_xlabel(f"{panel.axis} (log scale)")
    axes.set_ylabel("test accuracy (%)")
    return figure


def _seeds(axes: Axes, line: Line, xs: Sequence[Sequence[float]]) -> None:
    colour = _look(line.look)["color"]
    flat = [x for values in xs for x in values]
    ys = [y for point in line.points for y in point.ys]
    axes.plot(
        flat,
        ys,
        linestyle="none",
        marker="o",
        markersize=2.7,
        markeredgewidth=0,
        color=colour,
        alpha=0.45,
        gid=f"seeds-{slug(line.label)}",
        clip_on=False,
        zorder=2,
    )


def _means(axes: Axes, line: Line, xs: Sequence[float]) -> None:
    look = _look(line.look)
    order = np.argsort(xs, kind="stable")
    means, lows, highs = np.array([mean_interval(line.points[i].ys) for i in order]).T
    where = np.asarray(xs)[order]
    axes.vlines(where, lows, highs, color=look["color"], linewidth=1.1, zorder=2.5)
    axes.plot(where, means, zorder=3, **look)


def _log_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values between two positive ones, as even as a logarithmic axis allows."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low / 1.02 <= tick <= high * 1.02]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return sorted({float(f"{tick:.2g}") for tick in np.geomspace(low, high, 5)})


def _short(value: float) -> str:
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


# ---------------------------------------------------------------------------------------------- training


@_figure.register
def _(panel: CurvesPanel) -> Figure:
    labels = [curve.label for curve in panel.curves]
    figure, bottom = _canvas(panel, 3.3, labels, [curve.look for curve in panel.curves])
    accuracy = _axes(figure, bottom + 1.55, 1.75)
    loss = _axes(figure, bottom, 1.4, sharex=accuracy)
    accuracy.tick_params(labelbottom=False)
    losses = np.concatenate([curve.means[1] for curve in panel.curves])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    for row, axes in enumerate((accuracy, loss)):
        for number, curve in enumerate(panel.curves):
            look = _look(curve.look) | {"markersize": 3.4}
            spacing = max(1, len(curve.epochs) // 5)
            axes.fill_between(
                curve.epochs, curve.lows[row], curve.highs[row], color=look["color"], alpha=0.15, linewidth=0
            )
            axes.plot(curve.epochs, curve.means[row], markevery=(number % spacing, spacing), **look)
            starts = [epoch for epoch, _ in curve.phases[1:]]
            if starts:
                heights = np.interp(starts, curve.epochs, curve.means[row])
                axes.plot(
                    starts,
                    heights,
                    linestyle="none",
                    marker="|",
                    markersize=8,
                    markeredgewidth=1.6,
                    color=look["color"],
                )
    if len(losses):
        low, high = losses.min(), losses.max()
        ticks = _log_ticks(low, high)
        loss.set_yscale("log")
        loss.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        loss.minorticks_off()
        loss.set_ylim(low / 1.2, high * 1.2)
    means = np.concatenate([curve.means[0] for curve in panel.curves])
    if np.isfinite(means).any():
        _frame(accuracy, means[np.isfinite(means)])
    loss.set_xlabel("epoch of the run")
    accuracy.set_ylabel("validation accuracy (%)")
    loss.set_ylabel("training loss (log)")
    _name_phases(accuracy, panel)
    return figure


def _name_phases(axes: Axes, panel: CurvesPanel) -> None:
    """Names of the phases above the frame, where all variants share them and there is room."""
    shared = {curve.phases for curve in panel.curves if curve.look is not None}
    last = max(curve.epochs[-1] for curve in panel.curves)
    if len(shared) != 1 or len(names := shared.pop()) < 2:
        return
    ends = [epoch for epoch, _ in names[1:]] + [last]
    if any(end - epoch < 0.022 * len(name) * last for (epoch, name), end in zip(names, ends)):
        return
    for epoch, name in names:
        if epoch > 1:
            axes.axvline(epoch, color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(
            name,
            (epoch, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(1, 1),
            textcoords="offset points",
            fontsize=7,
            color=MUTED,
            va="bottom",
        )


# ---------------------------------------------------------------------------------------------- claims

_VERDICT_LOOKS = {
    "replicated": (PALETTE[2], "D", True),
    "contradicted": (PALETTE[1], "X", True),
    "open": (MUTED, "o", False),
    "not tested": (GRID, "_", False),
}
_EFFECT_ROW = 0.42


@_figure.register
def _(panel: ClaimPanel) -> Figure:
    present = [verdict for verdict in VERDICTS if verdict in {effect.verdict for effect in panel.effects}]
    height = _EFFECT_ROW * len(panel.effects) + 0.1
    bottom = _BOTTOM + _ROW * (1 + panel.axis.count("\n")) + 0.05
    figure = Figure(figsize=(WIDTH, bottom + height + _TOP))
    whole = figure.get_figheight()
    _title(figure, panel)
    axes = figure.add_axes((0.12 / WIDTH, bottom / whole, 1 - 0.24 / WIDTH, height / whole))
    if panel.logarithmic:
        axes.set_xscale("log")
    _effect_limits(axes, panel)
    left, right = axes.get_xlim()
    for number, effect in enumerate(panel.effects):
        colour, marker, filled = _VERDICT_LOOKS[effect.verdict]
        y = -number - 0.62
        axes.annotate(
            effect.label,
            (0, y + 0.28),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            fontsize=min(7.6, 480 / len(effect.label)),
            va="center",
        )
        if panel.null is not None:
            axes.vlines(panel.null, y - 0.2, y + 0.16, color=INK, linewidth=1.0, zorder=1.5)
        axes.vlines(
            effect.bounds, y - 0.2, y + 0.16, color=INK, linewidth=1.0, linestyle=(0, (3, 1.5)), zorder=1.5
        )
        axes.plot(
            effect.values,
            [y] * len(effect.values),
            linestyle="none",
            marker="o",
            markersize=3.2,
            markeredgewidth=0,
            color=PALETTE[0],
            alpha=0.5,
            gid=f"pairs-{number}",
            zorder=2,
        )
        if effect.estimate is None:
            continue
        # an end that is infinite reaches the frame
        ends = (left if effect.low is None else effect.low, right if effect.high is None else effect.high)
        axes.hlines(y, *ends, color=colour, linewidth=1.6, zorder=2.5)
        axes.plot(
            [effect.estimate],
            [y],
            marker=marker,
            markersize=6,
            color=colour,
            markeredgewidth=1.3,
            zorder=3,
            markerfacecolor=colour if filled else "none",
        )
    if panel.paper_value is not None:
        axes.axvline(panel.paper_value, color=PALETTE[4], linewidth=1.4, linestyle=(0, (1, 1)), zorder=1.5)
    axes.set_ylim(-len(panel.effects) - 0.1, 0.05)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(panel.axis)
    handles = [_verdict_handle(verdict) for verdict in present]
    labels = list(present)
    if any(effect.bounds for effect in panel.effects):
        handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (3, 1.5))))
        labels.append(panel.bound)
    if panel.paper_value is not None:
        handles.append(Line2D([], [], color=PALETTE[4], linewidth=1.4, linestyle=(0, (1, 1))))
        labels.append("paper's number")
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.08 / WIDTH, 0.02 / whole),
        ncol=5,
        handlelength=1.6,
        columnspacing=1.0,
        borderpad=0.1,
        borderaxespad=0.0,
        fontsize=7.5,
    )
    return figure


def _verdict_handle(verdict: str) -> Line2D:
    colour, marker, filled = _VERDICT_LOOKS[verdict]
    return Line2D(
        [],
        [],
        color=colour,
        marker=marker,
        markersize=6,
        markeredgewidth=1.3,
        linewidth=1.6,
        markerfacecolor=colour if filled else "none",
    )


def _effect_limits(axes: Axes, panel: ClaimPanel) -> None:
    """All pairs, estimates, bounds and the null line, with some air; wider intervals are cut at the frame."""
    values = [] if panel.null is None else [panel.null]
    values += [value for effect in panel.effects for value in (*effect.values, *effect.bounds)]
    values += [effect.estimate for effect in panel.effects if effect.estimate is not None]
    values += [] if panel.paper_value is None else [panel.paper_value]
    known = [end for effect in panel.effects for end in (effect.low, effect.high) if end is not None]
    low, high = min(values), max(values)
    if panel.logarithmic:
        ticks = _log_ticks(low / 1.3, high * 1.3)
        axes.set_xticks(ticks, [f"{tick:.3g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(low / 1.3, high * 1.3)
        return
    span = high - low or 1.0
    low = min([low, *(end for end in known if end > low - 0.3 * span)])
    high = max([high, *(end for end in known if end < high + 0.3 * span)])
    axes.set_xlim(low - 0.05 * span, high + 0.05 * span)


@_figure.register
def _(panel: OverviewPanel) -> Figure:
    wide, side, gap, room, names = 0.63, 0.48, 0.06, 7.6, 1.95
    a_row = int((room - names - 0.1) // (wide + gap))
    height = _TOP + 0.35
    tops = []
    for _, claims in panel.rows:
        tops.append(height)
        height += (side + gap) * max(1, math.ceil(len(claims) / a_row)) + 0.06
    figure = Figure(figsize=(room, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, room), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.1, 0.1, panel.title, va="top", fontsize=10, fontweight="bold")
    counts = [verdict for _, claims in panel.rows for _, verdict in claims]
    words = [f"{VERDICTS[verdict]} {verdict} {counts.count(verdict)}" for verdict in VERDICTS]
    axes.text(0.1, _TOP + 0.06, "     ".join(words), va="top", fontsize=8.5)
    for (name, claims), top in zip(panel.rows, tops):
        axes.text(0.1, top + side / 2, name, va="center", fontsize=8.5, fontweight="bold")
        for number, (claim, verdict) in enumerate(claims):
            x, y = names + (number % a_row) * (wide + gap), top + (number // a_row) * (side + gap)
            colour = _VERDICT_LOOKS[verdict][0]
            axes.add_patch(Rectangle((x, y), wide, side, facecolor=colour, alpha=0.25, linewidth=0))
            axes.add_patch(Rectangle((x, y), wide, side, fill=False, edgecolor=colour, linewidth=1.2))
            middle: dict[str, Any] = {"ha": "center", "va": "center"}
            axes.text(x + wide / 2, y + 0.14, VERDICTS[verdict], fontsize=11, **middle)
            parts = textwrap.wrap(claim, 11) or [""]
            size = min(6.5, 68 / max(map(len, parts)), 14 / len(parts))
            axes.text(x + wide / 2, y + 0.34, "\n".join(parts), fontsize=size, linespacing=1.0, **middle)
    return figure
