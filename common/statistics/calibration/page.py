"""What `reports/calibration` holds: the table as README.md, every number as calibration.json, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.statistics.calibration.cells import EQUAL, FIXED, LOOKED, UNEQUAL, Cell
from common.statistics.calibration.results import AGAIN, Result
from common.statistics.inference import ALPHA

DESIGNS = (*FIXED, LOOKED)
# light to dark by seeds; the looks stand apart in colour and marker
_COLOURS = dict(zip(DESIGNS, ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b", "#d55e00")))
_MARKERS = {design: "D" if design.looks else "o" for design in DESIGNS}

_TEXT = """# Calibration of the verdicts

How often the engine errs on made-up papers of known truth: `python -m common.statistics.calibrate --papers {papers}`
makes records and claims, and has them judged as real ones are. {cells} cells of {papers:,} papers each; the same numbers on
every run.

- **Null**: the truth lies on the border of what a claim says, and both arms have one distribution, collapsed and
  diverged runs included (shifted by what matters, where there is a border other than 0). Each answer may be given in 5 %
  of papers, plus two simulation errors. {held} of {nulls} cells hold this; the highest rate is {highest}.
{series}- A null cell above its goal is told from chance by {again} times as many new papers, and those are shown: {repeated}.
- **Power**: one comparison, normal differences, eight seeds, one standard deviation from the border: at least 80 %;
  between both borders (equivalence): at least 60 %; half a standard deviation, judged look by look up to 64 seeds: at
  least 90 %. {powers}
- **What no test of a mean can hold.** A mean that one run in ten carries is not seen by those who see eight: where one
  arm collapses more often than the other at equal means, or the differences are skewed (log-normal), verdicts on the
  mean err far more often than 5 %. The last table shows by how much; no goal is set. Where runs collapse, a report
  shows rates of collapse, median and interquartile mean beside the verdict, and those are what to read.

![rates of wrong verdicts](calibration.png)

Percent of papers, *replicated / contradicted*; – where the answer is right, or says nothing. Truths are in units of
what matters, which is one standard deviation of a difference. **Bold**: misses the goal; with a star: simulated again.
"inside": any comparison on the border, by the graded verdicts in a claim.
"""


def write(results: Sequence[Result], folder: Path) -> None:
    """Write README.md, calibration.json and calibration.png; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(_readme(results), encoding="utf-8")
    lines = ",\n".join(json.dumps(_entry(result), ensure_ascii=False) for result in results)
    (folder / "calibration.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    _draw(results).savefig(folder / "calibration.png", dpi=110, metadata={"Software": None})


def _entry(result: Result) -> dict[str, Any]:
    cell = result.cell
    return {
        "kind": cell.kind,
        "question": cell.question.name,
        "accuracies": cell.outcome,
        "design": cell.design.name,
        "family": cell.family.name,
        "papers": result.papers,
        "rates": result.rates(),
        "goal": result.goal(),
        "missed": result.missed(),
        "first": result.first,
    }


# ------------------------------------------------------------------------------------------------ table


def _readme(results: Sequence[Result]) -> str:
    nulls, powers = ([r for r in results if r.cell.kind == kind] for kind in ("null", "power"))
    rates = [rate for result in nulls for rate in result.rates().values()]
    short = [result.cell.question.name for result in powers if result.missed()]
    text = _TEXT.format(
        cells=len(results),
        papers=min(result.papers for result in results),
        nulls=len(nulls),
        held=sum(not result.missed() for result in nulls),
        highest=f"{100 * max(rates):.1f} %" if rates else "-",
        again=AGAIN,
        repeated=f"{sum(result.first is not None for result in nulls)} cells",
        powers=f"Missed: {'; '.join(short)}." if short else "All do.",
        series="".join(map(_series, (result for result in nulls if result.cell.papers))),
    )
    alone = [r for r in nulls if r.cell.family.size == 1]
    several = [r for r in nulls if r.cell.family.size > 1]
    shown = [r for r in results if r.cell.kind == "shown"]
    unlike = [r for r in shown if r.cell.outcome in UNEQUAL]
    rest = [*powers, *(r for r in shown if r.cell.outcome not in UNEQUAL)]
    by_design: Callable[[Cell], str] = lambda cell: cell.design.name
    parts = [
        text,
        "## Null: one comparison\n",
        _table(alone, ("test", "accuracies"), lambda c: (c.question.name, c.outcome), by_design),
        "## Null: several comparisons or claims\n",
        "Any claim of several; where the others hold or fail, the first one.\n",
        _table(several, ("test", "accuracies", "seeds"), _family_row, lambda c: c.family.name),
        "## Power\n",
        _table(rest, ("test", "accuracies"), lambda c: (c.question.name, c.outcome), by_design),
        "## Arms that are not alike: no goal\n",
        _table(unlike, ("test", "accuracies"), lambda c: (c.question.name, c.outcome), by_design),
    ]
    return "\n".join(parts)


def _series(result: Result) -> str:
    """The line on a null cell with a number of papers of its own."""
    cell, rates = result.cell, (f"{100 * rate:.2f} % {answer}" for answer, rate in result.rates().items())
    return (
        f"- {result.papers:,} papers of one comparison ({cell.question.name}, {cell.outcome}), judged by "
        f"{cell.design.name}: {', '.join(rates)} at whatever look.\n"
    )


def _family_row(cell: Cell) -> tuple[str, ...]:
    return cell.question.name, cell.outcome, cell.design.name


def _table(
    results: Iterable[Result],
    heads: tuple[str, ...],
    row_of: Callable[[Cell], tuple[str, ...]],
    column_of: Callable[[Cell], str],
) -> str:
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for result in results:
        rows.setdefault(row_of(result.cell), {})[column_of(result.cell)] = _rates(result)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[*heads, *columns], ["---"] * len(heads) + ["---:"] * len(columns)]
    lines += [[*names, *(row.get(column, "") for column in columns)] for names, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rates(result: Result) -> str:
    rates, missed = result.rates(), result.missed()

    def shown(answer: str) -> str:
        if answer not in rates:
            return "–"
        text = f"{100 * rates[answer]:.1f}"
        return f"**{text}**" if answer in missed else text

    both = ("replicated", "contradicted")
    text = " / ".join(map(shown, both))
    if any(f"{answer} inside" in rates for answer in both):
        text += f" (inside {' / '.join(shown(f'{answer} inside') for answer in both)})"
    return text + "*" * (result.first is not None)


# ---------------------------------------------------------------------------------------------- picture


def _draw(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(4, 5))
    nulls = [r for r in results if r.cell.kind == "null"]
    many = [r for r in nulls if r.cell.family.size > 1]
    rows: dict[str, list[Result]] = {
        name: [r for r in nulls if r.cell.outcome == name and r.cell.family.size == 1] for name in EQUAL
    }
    rows["3 comparisons or claims"] = [r for r in many if r.cell.family.size == 3]
    rows["9 comparisons or claims"] = [r for r in many if r.cell.family.size == 9]
    left = figure.add_subplot(grid[:, 0])
    _strip(left, rows)
    left.set_title("Null: each point is one answer of one test", loc="left")
    # of the cells with the fewest papers
    goal = 100 * max((result.goal() or ALPHA for result in nulls), default=ALPHA)
    left.axvspan(100 * ALPHA, goal, color="#e0e0e0", zorder=0)
    handles: list[Any] = [
        Line2D([], [], marker=_MARKERS[d], linestyle="", color=_COLOURS[d], label=d.name) for d in DESIGNS
    ]
    handles.append(Patch(color="#e0e0e0", label="5 % and two simulation errors"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    upper = figure.add_subplot(grid[0, 1])
    _strip(upper, {name: [r for r in results if r.cell.outcome == name] for name in UNEQUAL})
    upper.set_title("Arms that are not alike: no goal", loc="left")
    _powers(figure.add_subplot(grid[1, 1]), [r for r in results if r.cell.kind == "power"])
    return figure


def _strip(axes: Axes, rows: dict[str, list[Result]]) -> None:
    """A row for each name, in it a line for each design, on that a point for each rate."""
    for at, found in enumerate(rows.values()):
        axes.axhspan(at - 0.5, at + 0.5, color="#f6f6f6" if at % 2 else "white", zorder=-1)
        for result in found:
            design = result.cell.design
            height = at + (DESIGNS.index(design) - (len(DESIGNS) - 1) / 2) / (len(DESIGNS) + 1)
            rates = [100 * rate for rate in result.rates().values()]
            style: dict[str, Any] = {"color": _COLOURS[design], "markersize": 4, "alpha": 0.8}
            axes.plot(rates, [height] * len(rates), _MARKERS[design], **style)
    axes.axvline(100 * ALPHA, color="#222222", linewidth=1)
    _finish(axes, list(rows), "papers with the answer, %")


def _powers(axes: Axes, results: Sequence[Result]) -> None:
    for at, result in enumerate(results):
        rates = [100 * rate for rate in result.rates().values()]
        axes.plot(rates, [at] * len(rates), "o", color="#4292c6")
        axes.plot([100 * (result.goal() or 0)], [at], "|", color="#222222", markersize=14)
    handles = [
        Line2D([], [], marker="o", linestyle="", color="#4292c6", label="found"),
        Line2D([], [], marker="|", linestyle="", color="#222222", markersize=12, label="goal"),
    ]
    axes.legend(handles=handles, loc="lower left", fontsize=8)
    names = [
        f"{r.cell.question.name}: {r.cell.question.answers[0]}" + ", with looks" * bool(r.cell.design.looks)
        for r in results
    ]
    _finish(axes, names, "papers with the answer, %")
    axes.set_xlim(0, 102)
    axes.set_title("Power: eight seeds, or up to 64 by looks", loc="left")


def _finish(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
