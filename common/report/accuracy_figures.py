"""Figures of accuracy: against the target, against a cost, and over the epochs of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.naming import slug
from common.report.canvas import INK, MUTED, axes_of, blank, frame, log_ticks, look_of, short
from common.report.panels import (
    CostPanel,
    CurvesPanel,
    Line,
    TargetPanel,
    interquartile_interval,
    mean_interval,
)
from common.statistics.flips import interquartile_mean

HEIGHT = 2.6
"""Inches of axes of accuracy."""


def position(target: float) -> float:
    """Place of a target on the axis: halving what remains is one step, which opens up the high end."""
    return -math.log2(1 - target)


def against_target(panel: TargetPanel) -> Figure:
    """Every seed at its target, and what stands for all of them."""
    figure, bottom = blank(
        panel, HEIGHT, [line.label for line in panel.lines], [line.look for line in panel.lines]
    )
    axes = axes_of(figure, bottom, HEIGHT)
    targets = sorted({point.target for line in panel.lines for point in line.points})
    place = position if all(0 <= target < 1 for target in targets) else float
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
        _centres(axes, line, xs, panel.centre)
        if line.look is None and len(line.points) == 1 and len(targets) > 1:
            axes.axhline(
                float((np.mean if panel.centre == "mean" else interquartile_mean)(line.points[0].ys)),
                color=INK,
                linewidth=0.8,
                linestyle=(0, (1, 1.6)),
                zorder=1.5,
            )
    frame(axes, [y for line in panel.lines for point in line.points for y in point.ys])
    axes.set_xticks(ticks, _thinned(ticks, [f"{100 * target:.4g}" for target in targets]))
    axes.set_xlim(ticks[0] - 0.3, ticks[-1] + 0.3)
    axes.set_xlabel("target: share removed (%), spaced by what remains")
    axes.set_ylabel(f"test accuracy (%), {panel.centre}")
    return figure


def _thinned(ticks: Sequence[float], labels: Sequence[str]) -> list[str]:
    """The labels without those that would touch their neighbour; the highest target keeps its label."""
    room = 0.075 * (ticks[-1] - ticks[0] + 0.6)
    shown, last = [], math.inf
    for tick, label in zip(reversed(ticks), reversed(labels)):
        shown.append(label if last - tick > room else "")
        last = tick if shown[-1] else last
    return shown[::-1]


def against_cost(panel: CostPanel) -> Figure:
    """Every seed at its cost, and what stands for all of them."""
    figure, bottom = blank(
        panel, HEIGHT, [line.label for line in panel.lines], [line.look for line in panel.lines]
    )
    axes = axes_of(figure, bottom, HEIGHT, xscale="log")
    for line in panel.lines:
        _seeds(axes, line, [point.xs for point in line.points])
        _centres(axes, line, [math.exp(np.mean(np.log(point.xs))) for point in line.points], panel.centre)
    xs = [x for line in panel.lines for point in line.points for x in point.xs]
    ticks = log_ticks(min(xs), max(xs))
    axes.set_xticks(ticks, [f"{short(tick)}{panel.unit}" for tick in ticks])
    axes.minorticks_off()
    air = (max(xs) / min(xs)) ** 0.06
    axes.set_xlim(min(xs) / air, max(xs) * air)
    frame(axes, [y for line in panel.lines for point in line.points for y in point.ys])
    axes.set_xlabel(f"{panel.axis} (log scale)")
    axes.set_ylabel(f"test accuracy (%), {panel.centre}")
    return figure


def _seeds(axes: Axes, line: Line, xs: Sequence[Sequence[float]]) -> None:
    colour = look_of(line.look)["color"]
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


def _centres(axes: Axes, line: Line, xs: Sequence[float], centre: str) -> None:
    summary = mean_interval if centre == "mean" else interquartile_interval
    look = look_of(line.look)
    order = np.argsort(xs, kind="stable")
    means, lows, highs = np.array([summary(line.points[i].ys) for i in order]).T
    where = np.asarray(xs)[order]
    axes.vlines(where, lows, highs, color=look["color"], linewidth=1.1, zorder=2.5)
    axes.plot(where, means, zorder=3, **look)


def training(panel: CurvesPanel) -> Figure:
    """Validation accuracy above, training loss below."""
    labels = [curve.label for curve in panel.curves]
    figure, bottom = blank(panel, 3.3, labels, [curve.look for curve in panel.curves])
    accuracy = axes_of(figure, bottom + 1.55, 1.75)
    loss = axes_of(figure, bottom, 1.4, sharex=accuracy)
    accuracy.tick_params(labelbottom=False)
    losses = np.concatenate([curve.means[1] for curve in panel.curves])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    for row, axes in enumerate((accuracy, loss)):
        for number, curve in enumerate(panel.curves):
            look = look_of(curve.look) | {"markersize": 3.4}
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
        ticks = log_ticks(low, high)
        loss.set_yscale("log")
        loss.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        loss.minorticks_off()
        loss.set_ylim(low / 1.2, high * 1.2)
    means = np.concatenate([curve.means[0] for curve in panel.curves])
    if np.isfinite(means).any():
        frame(accuracy, means[np.isfinite(means)])
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
