"""Panels become figures: SVG with equal bytes on every drawing, as a file and as text to set inside a page."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from common.report import accuracy_figures, canvas, claim_figures, overview_figures
from common.report.panels import (
    ClaimPanel,
    CostPanel,
    CurvesPanel,
    ImprovementPanel,
    Panel,
    ProfilesPanel,
    ScalesPanel,
    TargetPanel,
)
from common.report.svg import compact, inline
from common.report.tidy import tidy

PNG_DPI = 144
_FIGURES: dict[type[Panel], Callable[[Any], Figure]] = {
    TargetPanel: accuracy_figures.against_target,
    CostPanel: accuracy_figures.against_cost,
    CurvesPanel: accuracy_figures.training,
    ClaimPanel: claim_figures.effects,
    ImprovementPanel: overview_figures.improvements,
    ProfilesPanel: overview_figures.profiles,
}


@dataclass(frozen=True)
class Drawn:
    """A finished figure: the SVG of its file, the SVG as it stands inside a page, and its rows as CSV."""

    name: str
    heading: str
    title: str
    caption: str
    svg: str
    inline: str
    csv: str
    size: tuple[int, int]
    """Width and height in CSS pixels, so that a page keeps its place while the file loads."""


def draw(panel: Panel) -> Drawn:
    """Draw one panel. Pure: the same panel gives the same bytes."""
    with matplotlib.rc_context(canvas.STYLE):
        figure = _FIGURES[type(panel)](panel)
        svg = io.StringIO()
        FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = compact(svg.getvalue())
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Drawn(
        panel.name,
        panel.heading,
        panel.title,
        panel.caption,
        text,
        inline(text, panel.name, panel.title, canvas.THEMED),
        tidy(panel),
        (width, height),
    )


def png(panel: ScalesPanel) -> bytes:
    """The picture of all scales as a bitmap on white, for a README."""
    with matplotlib.rc_context(canvas.STYLE):
        figure = overview_figures.scales(panel)
        figure.set_facecolor("white")
        figure.set_dpi(PNG_DPI)
        found = io.BytesIO()
        FigureCanvasAgg(figure).print_png(found, metadata={"Software": None})
    return found.getvalue()
