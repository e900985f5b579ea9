"""Figures of what a claim compares."""

from __future__ import annotations

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from common.report.canvas import (
    BOTTOM,
    GRID,
    INK,
    MUTED,
    PALETTE,
    ROW,
    WIDTH,
    legend,
    log_ticks,
    title,
    top_of,
)
from common.report.panels import VERDICTS, ClaimPanel

VERDICT_LOOKS = {
    "replicated": (PALETTE[2], "D", True),
    "contradicted": (PALETTE[1], "X", True),
    "open": (MUTED, "o", False),
    "not tested": (GRID, "_", False),
}
EFFECT_ROW = 0.42


def effects(panel: ClaimPanel) -> Figure:
    """A row a comparison: every seed, the interval that decides, and what does not matter shaded."""
    present = [verdict for verdict in VERDICTS if verdict in {effect.verdict for effect in panel.effects}]
    height = EFFECT_ROW * len(panel.effects) + 0.1
    bottom = BOTTOM + ROW * (1 + panel.axis.count("\n")) + 0.05
    figure = Figure(figsize=(WIDTH, bottom + height + top_of(panel)), facecolor="none")
    whole = figure.get_figheight()
    title(figure, panel)
    axes = figure.add_axes((0.12 / WIDTH, bottom / whole, 1 - 0.24 / WIDTH, height / whole))
    if panel.logarithmic:
        axes.set_xscale("log")
    _effect_limits(axes, panel)
    left, right = axes.get_xlim()
    for number, effect in enumerate(panel.effects):
        colour, marker, filled = VERDICT_LOOKS[effect.verdict]
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
        if effect.band is not None:
            axes.fill_betweenx((y - 0.2, y + 0.16), *effect.band, color=GRID, linewidth=0, zorder=1)
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
    axes.grid(visible=False)  # lines would cross the labels
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(panel.axis)
    handles: list[Artist] = [_verdict_handle(verdict) for verdict in present]
    labels = list(present)
    if any(effect.bounds for effect in panel.effects):
        handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (3, 1.5))))
        labels.append("claimed bound")
    if any(effect.band for effect in panel.effects):
        handles.append(Rectangle((0, 0), 1, 1, color=GRID))
        labels.append("does not matter")
    if panel.paper_value is not None:
        handles.append(Line2D([], [], color=PALETTE[4], linewidth=1.4, linestyle=(0, (1, 1))))
        labels.append("paper's number")
    legend(figure, handles, labels, 5, handlelength=1.6, columnspacing=1.0)
    return figure


def _verdict_handle(verdict: str) -> Line2D:
    colour, marker, filled = VERDICT_LOOKS[verdict]
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
    values += [
        value for effect in panel.effects for value in (*effect.values, *effect.bounds, *(effect.band or ()))
    ]
    values += [effect.estimate for effect in panel.effects if effect.estimate is not None]
    values += [] if panel.paper_value is None else [panel.paper_value]
    known = [end for effect in panel.effects for end in (effect.low, effect.high) if end is not None]
    low, high = min(values), max(values)
    if panel.logarithmic:
        ticks = log_ticks(low / 1.3, high * 1.3)
        axes.set_xticks(ticks, [f"{tick:.3g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(low / 1.3, high * 1.3)
        return
    span = high - low or 1.0
    low = min([low, *(end for end in known if end > low - 0.3 * span)])
    high = max([high, *(end for end in known if end < high + 0.3 * span)])
    axes.set_xlim(low - 0.05 * span, high + 0.05 * span)
