"""Panels become figures: SVG and PNG with equal bytes on every drawing, and SVG text to set inside a page.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every variant has its own marker and dash
as well, so that no figure depends on colour.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1.2, 1.2)), (0, (7, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 2)), (0, (2, 2)))
INK, MUTED, GRID = "#222222", "#6a6a6a", "#dcdcdc"
THEMED = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}
THEMED |= {colour: f"var(--series-{i})" for i, colour in enumerate(PALETTE)}

WIDTH = 4.0
"""Inches of every figure: drawn at a telephone's width, so that its text stays readable there."""
PNG_DPI = 160
_STYLE = {
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
    text = _compact(svg.getvalue())
    return Drawn(panel.name, panel.heading, panel.caption, text, png.getvalue(), _inline(text, panel))


@functools.singledispatch
def _figure(panel: Panel) -> Figure:
    raise TypeError(f"no figure for {type(panel).__name__}")


# ---------------------------------------------------------------------------------------------- looks


def _look(index: int | None) -> dict:
    """Line2D properties of a variant's look; the reference (None) is drawn in ink."""
    if index is None:
        return {"color": INK, "marker": "_", "linestyle": (0, (1, 1.6)), "markersize": 7, "markeredgewidth": 1.6}
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


def _canvas(panel: Panel, height: float, labels: Sequence[str], looks: Sequence[int | None]) -> tuple[Figure, float]:
    """A figure with title and legend, for axes of this height (inches); returns it and the bottom of its axes."""
    columns = 2 if max((len(label) for label in labels), default=0) <= _WIDE_LABEL and len(labels) > 1 else 1
    bottom = _BOTTOM + _ROW * math.ceil(len(labels) / columns) + 0.05
    figure = Figure(figsize=(WIDTH, bottom + height + _TOP))
    figure.text(0.08 / WIDTH, 1 - 0.08 / figure.get_figheight(), panel.title, va="top", fontsize=9, fontweight="bold")
    handles = [Line2D([], [], **_look(look)) for look in looks]
    figure.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.08 / WIDTH, 0.02 / figure.get_figheight()), ncol=columns,
        handlelength=3.0, columnspacing=1.2, labelspacing=0.3, borderpad=0.1, borderaxespad=0.0,
    )  # fmt: skip
    return figure, bottom


def _axes(figure: Figure, bottom: float, height: float, **options) -> Axes:
    whole = figure.get_figheight()
    return figure.add_axes((_LEFT / WIDTH, bottom / whole, 1 - (_LEFT + _RIGHT) / WIDTH, height / whole), **options)


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Limits of an accuracy axis in %: all seeds with some air; wider intervals are cut at the frame."""
    low, high = min(values), max(values)
    air = 0.06 * max(high - low, 2.0)
    axes.set_ylim(low - air, high + air)


# ---------------------------------------------------------------------------------------------- accuracy


def _position(target: float) -> float:
    """Place of a target on the axis: halving what remains is one step, which opens up the high-sparsity end."""
    return -math.log2(1 - target)


@_figure.register
def _(panel: TargetPanel) -> Figure:
    figure, bottom = _canvas(panel, 2.45, [line.label for line in panel.lines], [line.look for line in panel.lines])
    axes = _axes(figure, bottom, 2.45)
    targets = sorted({point.target for line in panel.lines for point in line.points})
    place = _position if all(0 <= target < 1 for target in targets) else float
    ticks = [place(target) for target in targets]
    gaps = [b - a for a, b in zip(ticks, ticks[1:])]
    # side by side, and the seeds of each side by side too, so that nothing hides
    step = min(0.09, 0.45 * min(gaps, default=1.0) / len(panel.lines))
    compared = [line for line in panel.lines if line.look is not None]
    for line in panel.lines:
        shift = 0.0 if line.look is None else step * (compared.index(line) - (len(compared) - 1) / 2)
        xs = [place(point.target) + shift for point in line.points]
        spread = [step * np.linspace(-0.4, 0.4, len(point.ys)) for point in line.points]
        _seeds(axes, line, [x + beside for x, beside in zip(xs, spread)])
        _means(axes, line, xs)
        if line.look is None and len(line.points) == 1 and len(targets) > 1:
            axes.axhline(float(np.mean(line.points[0].ys)), color=INK, linewidth=0.8, linestyle=(0, (1, 1.6)), zorder=1.5)
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
    figure, bottom = _canvas(panel, 2.45, [line.label for line in panel.lines], [line.look for line in panel.lines])
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
        flat, ys, linestyle="none", marker="o", markersize=2.7, markeredgewidth=0, color=colour, alpha=0.45,
        gid=f"seeds-{slug(line.label)}", clip_on=False, zorder=2,
    )  # fmt: skip


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
            axes.fill_between(curve.epochs, curve.lows[row], curve.highs[row], color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(curve.epochs, curve.means[row], markevery=(number % spacing, spacing), **look)
            starts = [epoch for epoch, _ in curve.phases[1:]]
            if starts:
                heights = np.interp(starts, curve.epochs, curve.means[row])
                axes.plot(starts, heights, linestyle="none", marker="|", markersize=8, markeredgewidth=1.6, color=look["color"])
    if len(losses) and losses.max() > 5 * losses.min():
        loss.set_yscale("log")
        ticks = _log_ticks(losses.min(), losses.max())
        loss.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        loss.minorticks_off()
    if len(losses):
        air = 0.06 * (losses.max() - losses.min() or 1.0)
        loss.set_ylim((losses.min() / 1.2, losses.max() * 1.2) if loss.get_yscale() == "log" else
                      (losses.min() - air, losses.max() + air))  # fmt: skip
    means = np.concatenate([curve.means[0] for curve in panel.curves])
    if np.isfinite(means).any():
        _frame(accuracy, means[np.isfinite(means)])
    loss.set_xlabel("epoch of the run")
    accuracy.set_ylabel("validation accuracy (%)")
    loss.set_ylabel("training loss")
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
        axes.annotate(name, (epoch, 1.0), xycoords=("data", "axes fraction"), xytext=(1, 1),
                      textcoords="offset points", fontsize=7, color=MUTED, va="bottom")  # fmt: skip


# ---------------------------------------------------------------------------------------------- claims

_VERDICT_LOOKS = {
    "replicated": (PALETTE[2], "D", True),
    "contradicted": (PALETTE[1], "X", True),
    "inconclusive": (MUTED, "o", False),
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
    figure.text(0.08 / WIDTH, 1 - 0.08 / whole, panel.title, va="top", fontsize=9, fontweight="bold")
    axes = figure.add_axes((0.12 / WIDTH, bottom / whole, 1 - 0.24 / WIDTH, height / whole))
    if panel.logarithmic:
        axes.set_xscale("log")
    for number, effect in enumerate(panel.effects):
        colour, marker, filled = _VERDICT_LOOKS[effect.verdict]
        y = -number - 0.62
        axes.annotate(effect.label, (0, y + 0.28), xycoords=("axes fraction", "data"), xytext=(2, 0),
                      textcoords="offset points", fontsize=min(7.6, 480 / len(effect.label)), va="center")  # fmt: skip
        if panel.null is not None:
            axes.vlines(panel.null, y - 0.2, y + 0.16, color=INK, linewidth=1.0, zorder=1.5)
        axes.vlines(effect.bounds, y - 0.2, y + 0.16, color=INK, linewidth=1.0, linestyle=(0, (3, 1.5)), zorder=1.5)
        axes.plot(effect.values, [y] * len(effect.values), linestyle="none", marker="o",
                  markersize=3.2, markeredgewidth=0, color=PALETTE[0], alpha=0.5, gid=f"pairs-{number}", zorder=2)  # fmt: skip
        if effect.estimate is None:
            continue
        if effect.low is not None and effect.high is not None:
            axes.hlines(y, effect.low, effect.high, color=colour, linewidth=1.6, zorder=2.5)
        axes.plot([effect.estimate], [y], marker=marker, markersize=6, color=colour, markeredgewidth=1.3, zorder=3,
                  markerfacecolor=colour if filled else "none")  # fmt: skip
    if panel.paper_value is not None:
        axes.axvline(panel.paper_value, color=PALETTE[4], linewidth=1.4, linestyle=(0, (1, 1)), zorder=1.5)
    _effect_limits(axes, panel)
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
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.08 / WIDTH, 0.02 / whole), ncol=5,
                  handlelength=1.6, columnspacing=1.0, borderpad=0.1, borderaxespad=0.0, fontsize=7.5)  # fmt: skip
    return figure


def _verdict_handle(verdict: str) -> Line2D:
    colour, marker, filled = _VERDICT_LOOKS[verdict]
    return Line2D([], [], color=colour, marker=marker, markersize=6, markeredgewidth=1.3, linewidth=1.6,
                  markerfacecolor=colour if filled else "none")  # fmt: skip


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
    side, gap, room, names = 0.42, 0.06, 7.6, 2.0
    a_row = int((room - names - 0.1) // (side + gap))
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
            x, y = names + (number % a_row) * (side + gap), top + (number // a_row) * (side + gap)
            colour = _VERDICT_LOOKS[verdict][0]
            axes.add_patch(Rectangle((x, y), side, side, facecolor=colour, alpha=0.25, linewidth=0))
            axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=colour, linewidth=1.2))
            axes.text(x + side / 2, y + 0.15, VERDICTS[verdict], ha="center", va="center", fontsize=11)
            axes.text(x + side / 2, y + 0.33, claim, ha="center", va="center", fontsize=min(7.0, 34 / len(claim)))
    return figure


# ---------------------------------------------------------------------------------------------- SVG text


def _compact(svg: str) -> str:
    """The same drawing in a third of the bytes: short numbers, one style for a row of equal markers, plain fonts."""
    svg = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', system-ui, sans-serif", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r' (?:d|x|y|width|height|points|transform)="[^"]*"', _shortened, svg)
    svg = re.sub(r">\s+<", "><", svg)

    def hoist(group: re.Match[str]) -> str:
        uses = group.group(2)
        styles = set(re.findall(r' style="([^"]*)"', uses))
        if len(styles) != 1 or uses.count("<use ") < 2:
            return group.group(0)
        return f'<g{group.group(1)} style="{styles.pop()}">' + re.sub(r' style="[^"]*"', "", uses) + "</g>"

    return re.sub(r"<g((?: clip-path=\"[^\"]*\")?)>((?:<use [^>]*/>)+)</g>", hoist, svg)


def _shortened(attribute: re.Match[str]) -> str:
    text = re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n.group()):.2f}".rstrip("0").rstrip("."), attribute.group())
    return re.sub(r"\s*\n([A-Za-z\"])", r"\1", text)


def _inline(svg: str, panel: Panel) -> str:
    """The drawing as an element of a page: its own ids, no outside names, and colours that follow the page's scheme."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body).group(1)
    body = body[body.index(">") + 1 :]
    referred = set(re.findall(r"#([\w-]+)", " ".join(re.findall(r'(?:url\(|href=")#[\w-]+', body))))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{panel.name}-{m.group(1)}"' if m.group(1) in referred else "", body)
    body = re.sub(r'xlink:href="#', f'href="#{panel.name}-', body)
    body = body.replace("url(#", f"url(#{panel.name}-")
    # the page's own background shows through
    body = re.sub(r'<path d="[^"]*" style="fill: #ffffff"/>', "", body)
    body = re.sub(r"<text style=\"(?![^\"]*fill:)", '<text style="fill: currentColor; ', body)
    for colour, variable in THEMED.items():
        body = body.replace(colour, variable)
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(panel.title, quote=True)}">{body}'
