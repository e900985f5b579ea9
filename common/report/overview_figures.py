"""Figures over all methods, and over all scales."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.report.canvas import BOTTOM, INK, WIDTH, axes_of, blank, look_of, title, top_of
from common.report.claim_figures import VERDICT_LOOKS
from common.report.panels import VERDICTS, ImprovementPanel, ProfilesPanel, ScalesPanel

_HEIGHT, _METHOD = 2.6, 0.3
_NAMES, _CELL, _LINE, _AIR = 4.9, 1.8, 0.15, 0.1
_STATEMENT = 84
"""Characters of a statement in one line."""


def profiles(panel: ProfilesPanel) -> Figure:
    """Share of runs that keep at least so much accuracy, one line a method."""
    lines = panel.profiles
    figure, bottom = blank(panel, _HEIGHT, [line.label for line in lines], [line.look for line in lines])
    axes = axes_of(figure, bottom, _HEIGHT)
    spacing = max(1, len(panel.levels) // 6)
    for number, line in enumerate(lines):
        look = look_of(line.look) | {"markersize": 3.6}
        axes.fill_between(panel.levels, line.lows, line.highs, color=look["color"], alpha=0.1, linewidth=0)
        axes.plot(panel.levels, line.shares, markevery=(number % spacing, spacing), **look)
    axes.set(xlim=(panel.levels[0], panel.levels[-1]), ylim=(-2, 102))
    axes.set_xlabel("test accuracy τ (%)")
    axes.set_ylabel("runs with at least τ (%)")
    return figure


def improvements(panel: ImprovementPanel) -> Figure:
    """A row a method: the probability that its run beats one of the other method."""
    height = _METHOD * len(panel.rows)
    figure = Figure(figsize=(WIDTH, BOTTOM + height + top_of(panel)), facecolor="none")
    title(figure, panel)
    whole = figure.get_figheight()
    axes = figure.add_axes((0.12 / WIDTH, BOTTOM / whole, 1 - 0.24 / WIDTH, height / whole))
    for number, (method, look, value, low, high) in enumerate(panel.rows):
        y = -number - 0.68
        axes.text(0.005, y + 0.42, method, fontsize=7.6, va="center")
        axes.vlines(0.5, y - 0.14, y + 0.14, color=INK, linewidth=1.0)
        colour = look_of(look)["color"]
        if low is not None and high is not None:
            axes.hlines(y, low, high, color=colour, linewidth=1.6)
        axes.plot([value], [y], **look_of(look))
    axes.set(xlim=(-0.02, 1.02), ylim=(-len(panel.rows) - 0.05, 0.05), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.set_xlabel(f"probability that a run beats one of {panel.other}")
    return figure


def scales(panel: ScalesPanel) -> Figure:
    """Headlines down, profiles across: verdict by colour, sign and word, with estimate and interval."""
    width = _NAMES + _CELL * len(panel.profiles)
    rows = [
        (textwrap.wrap(f"{paper}: {statement}", _STATEMENT), cells) for paper, statement, cells in panel.rows
    ]
    heights = [max(2, len(lines)) * _LINE + _AIR for lines, _ in rows]
    head = 0.62
    height = head + sum(heights)
    figure = Figure(figsize=(width, height), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.1, 0.1, panel.title, va="top", fontsize=10, fontweight="bold")
    for number, profile in enumerate(panel.profiles):
        x = _NAMES + _CELL * number + 0.06
        axes.text(x, head - 0.08, profile, va="bottom", fontsize=8.5, fontweight="bold")
    top = head
    for (lines, cells), tall in zip(rows, heights, strict=True):
        axes.text(0.1, top + 0.02, "\n".join(lines), va="top", fontsize=7.5, linespacing=1.2)
        for number, cell in enumerate(cells):
            if cell.verdict is None:
                continue
            x = _NAMES + _CELL * number
            colour = VERDICT_LOOKS[cell.verdict][0]
            box = (x, top), _CELL - 0.06, tall - _AIR / 2
            axes.add_patch(Rectangle(*box, facecolor=colour, alpha=0.2, linewidth=0))
            axes.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=1.0))
            words = f"{VERDICTS[cell.verdict]} {cell.verdict}   {cell.estimate}\n{cell.interval}"
            axes.text(x + 0.06, top + 0.04, words, va="top", fontsize=7, linespacing=1.3)
        top += tall
    return figure
