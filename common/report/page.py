"""The page: what the evidence says in the order a reader needs it, as one self-contained HTML file."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
from markdown_it import MarkdownIt

from common.records import Record
from common.report import equal_footing
from common.report.evidence import EQUAL_FOOTING, Evidence, Paper
from common.report.figures import Drawn
from common.report.gathering import MOST_LINES, Gathered, gather, measured, reference, used_variants
from common.report.judged import ClaimView
from common.report.panels import VERDICTS, percent, slug
from common.statistics.inference import detectable

FULL_SCALE = "paper"
"""The one profile whose numbers stand beside a paper's own."""
EXPERIMENT = "pruning-replications/{paper}"
_TEMPLATES = Path(__file__).parent / "templates"


def render(
    evidence: Evidence,
    views: Mapping[str, Sequence[ClaimView]],
    figures: Mapping[str, Sequence[Drawn]],
    paths: Mapping[str, Path],
) -> str:
    """The page as HTML.

    views: paper -> its claims. figures: paper, `<paper>/<claim id>` or `<EQUAL_FOOTING>/figures` -> drawings.
    paths: `results`, `replications`, `verdicts` and `out`, as the commands on the page name them.
    """
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    records = equal_footing.tagged(evidence.papers)
    verdicts = [view.verdict for paper in views.values() for view in paper]
    return environment.get_template("page.html.j2").render(
        style=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        symbols=VERDICTS,
        profile=evidence.profile,
        alpha=evidence.alpha,
        full_scale=evidence.profile == FULL_SCALE,
        runs=sum(len(paper.records) - len(paper.failed) for paper in evidence.papers),
        failed=sum(len(paper.failed) for paper in evidence.papers),
        claims=len(verdicts),
        counts={verdict: verdicts.count(verdict) for verdict in VERDICTS},
        papers=[
            _paper(paper, views[paper.name], figures, evidence.profile, paths) for paper in evidence.papers
        ],
        footing_figures=_by_heading(figures.get(f"{EQUAL_FOOTING}/figures", ())),
        own_footing=any(paper.name == EQUAL_FOOTING for paper in evidence.papers),
        footings=[_footing(found) for found in equal_footing.footings(records, evidence.papers)],
    )


def _paper(
    paper: Paper,
    views: Sequence[ClaimView],
    figures: Mapping[str, Sequence[Drawn]],
    profile: str,
    paths: Mapping[str, Path],
) -> dict[str, Any]:
    verdicts = [view.verdict for view in views]
    gathered = gather(paper.records)
    records_file = paths["results"] / f"{paper.name}.jsonl"
    last = paper.records[-1] if paper.records else None
    return {
        "name": paper.name,
        "anchor": slug(paper.name),
        "title": paper.title,
        "runs": len(paper.records) - len(paper.failed),
        "lost_trials": [_run_name(record) for record in paper.lost_trials],
        "failed": [
            {"name": _run_name(record), "reason": record.reason or "no reason given"}
            for record in paper.failed
        ],
        "counts": {verdict: verdicts.count(verdict) for verdict in VERDICTS},
        "claims": [
            {
                **vars(view),
                "anchor": f"{slug(paper.name)}-{slug(view.id)}",
                "figures": figures.get(f"{paper.name}/{view.id}", ()),
                "tested": any(row["estimate"] for row in view.comparisons),
            }
            for view in views
        ],
        "stale": paper.stale,
        "claims_file": paper.claims_file,
        "claims_digest": paper.claims_digest,
        "figures": _by_heading(figures.get(paper.name, ())),
        "tables": _tables(gathered, paper),
        "deviations": _markdown(paper.deviations) if paper.deviations else None,
        "commands": _commands(paper, profile, paths, records_file),
        "experiment": EXPERIMENT.format(paper=paper.name),
        "records_file": records_file.as_posix(),
        "example": {"variant": last.variant if last else "…", "target": last.target if last else "…"},
        "environment": _environment(paper.environment),
    }


def _by_heading(figures: Sequence[Drawn]) -> list[tuple[str, list[Drawn]]]:
    return [
        (heading, list(group))
        for heading, group in itertools.groupby(figures, key=lambda figure: figure.heading)
    ]


def _run_name(record: Record) -> str:
    """A run as its paper names it, for lists."""
    return "{variant}, {dataset}, {architecture}, target {target}, seed {seed}".format(**record.identity)


def _commands(paper: Paper, profile: str, paths: Mapping[str, Path], records_file: Path) -> str:
    def command(module: str, **options: str) -> str:
        return " \\\n    ".join(
            [f"python -m {module}", *(f"--{name} {value}" for name, value in options.items())]
        )

    records_path = records_file.as_posix()
    parts = [f"# trains what is missing and writes {records_path}\ndvc repro {paper.name}"]
    if paper.claims_file:
        judge = command(
            "common.statistics", records=records_path, claims=paper.claims_file, out="verdicts.json"
        )
        parts.append(f"# judges this paper's claims alone: estimates, intervals, p-values, verdicts\n{judge}")
    where = {name: path.as_posix() for name, path in paths.items()}
    draw = command("common.report", profile=profile, **where)
    parts.append(f"# draws figures, tables and this page, without training\n{draw}")
    return "\n\n".join(parts)


def _environment(found: Mapping[str, Any] | None) -> str | None:
    """One sentence on where the runs were made and how long they took."""
    if not found:
        return None
    machine = ", ".join(f"{key} {value}" for key, value in (found.get("machine") or {}).items())
    versions = ", ".join(f"{key} {value}" for key, value in (found.get("versions") or {}).items())
    seconds = found.get("seconds") or {}
    parts = [f"Machine: {machine}." if machine else "", f"Versions: {versions}." if versions else ""]
    others = Counter(str(other.get("device")) for other in (found.get("elsewhere") or {}).values())
    parts += [f"{count} runs were executed on {device}." for device, count in sorted(others.items())]
    if unfinished := found.get("unfinished"):
        parts.append(f"The stage was stopped before its end: {unfinished} of its runs are not here.")
    if seconds:
        total = sum(seconds.values())
        parts.append(
            f"{len(seconds)} runs took {total:.0f} s together, {total / len(seconds):.2f} s each on average."
        )
    return " ".join(part for part in parts if part) or None


@functools.cache
def _renderer() -> MarkdownIt:
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    # the page refers to nothing outside itself: a link shows its text, and its address as text
    renderer.add_render_rule("link_open", lambda *_: "")
    renderer.add_render_rule("link_close", _address)
    renderer.add_render_rule("image", lambda self, tokens, index, *_: tokens[index].content)
    return renderer


def _address(_renderer: Any, tokens: Sequence[Any], index: int, *_: Any) -> str:
    opened = next(token for token in reversed(tokens[:index]) if token.type == "link_open")
    address = str(opened.attrs.get("href", "")).split("://")[-1].removeprefix("#")
    text = "".join(token.content for token in tokens[tokens.index(opened) : index])
    return "" if not address or address in text else f" ({markupsafe.escape(address)})"


def _markdown(text: str) -> str:
    return (
        _renderer()
        .render(text)
        .replace("<table>", '<div class="scroll"><table>')
        .replace("</table>", "</table></div>")
    )


# ---------------------------------------------------------------------------------------------- tables


def _tables(gathered: Gathered, paper: Paper) -> list[dict[str, Any]]:
    """By cell: test accuracy (mean, standard deviation) by variant and target, and the networks' costs."""
    lost = Counter((r.dataset, r.architecture, r.variant, r.target) for r in paper.failed)
    named = {variant for claim in paper.claims for variant in used_variants(claim)}
    tables = []
    for (dataset, architecture), cell in gathered.items():
        targets = sorted({target for found in cell.values() for target in found})
        rows = {
            variant: [
                _accuracy(found.get(target, ()), lost[dataset, architecture, variant, target])
                for target in targets
            ]
            for variant, found in cell.items()
        }
        # of many variants, those that the claims are about come first
        main = [variant for variant in rows if variant in named or variant == reference(cell)]
        main = main if main and len(rows) > MOST_LINES + 1 else list(rows)
        place = f"{dataset} · {architecture}"
        tables.append(
            {
                "place": place,
                "caption": (
                    f"{place}: test accuracy in %, mean ± standard deviation over n seeds, and the smallest "
                    "shift of that mean that n seeds could have shown (power 0.8, one-sided 5 %)."
                ),
                "targets": [percent(target) for target in targets],
                "rows": [{"variant": variant, "cells": rows[variant]} for variant in main],
                "others": [
                    {"variant": variant, "cells": rows[variant]} for variant in rows if variant not in main
                ],
                "costs": [
                    {"variant": variant, "target": percent(target), "values": _costs(records)}
                    for variant, found in cell.items()
                    for target, records in found.items()
                ],
            }
        )
    return tables


def _accuracy(records: Sequence[Record], lost: int) -> dict[str, str] | None:
    values = [100 * value for record in records if (value := measured(record, "test_accuracy")) is not None]
    if not values and not lost:
        return None
    note = f"n {len(values)}" + (f", {lost} failed" if lost else "")
    if len(values) > 1:
        note += f", detects {detectable(len(values)) * float(np.std(values, ddof=1)):.2g}"
    return {"value": _mean_sd(values), "note": note}


def _mean_sd(values: Sequence[float]) -> str:
    """`mean ± standard deviation`, as far as there are enough values."""
    mean = f"{np.mean(values):.2f}" if values else "–"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def _costs(records: Sequence[Record]) -> list[str]:
    shown = []
    for name, form in (
        ("parameters", "{:,.0f}"),
        ("nonzero_parameters", "{:,.0f}"),
        ("compression", "{:.2f}×"),
        ("macs_left", "{:,.0f}"),
        ("theoretical_speedup", "{:.2f}×"),
    ):
        known = [value for record in records if (value := measured(record, name)) is not None]
        shown.append(form.format(sum(known) / len(known)) if known else "–")
    return shown


# ---------------------------------------------------------------------------------------------- equal footing


def _footing(found: equal_footing.Footing) -> dict[str, Any]:
    costs = {
        "training MACs": [row.training_macs for row in found.rows],
        "seconds a run": [row.seconds for row in found.rows],
    }
    costs = {name: values for name, values in costs.items() if any(value is not None for value in values)}
    few = found.seeds < equal_footing.FEWEST_SEEDS
    return {
        "place": found.place,
        "targets": [percent(target) for target in found.targets],
        "costs": list(costs),
        "caption": (
            "Test accuracy in %, mean ± standard deviation; below, n and the mean rank among all methods on "
            "the seeds that all of them finished (1 is best)."
        ),
        "improvement_caption": (
            "Probability that a run of the row's method beats one of the column's, averaged over the "
            "operating points, with 95 % bootstrap interval over seeds, not corrected for many pairs."
            + (" Too few common seeds for intervals." if few else "")
        ),
        "rows": [
            {
                "method": row.method,
                "cells": [_footing_cell(row, target) for target in found.targets],
                "rank": "–" if row.rank is None else f"{row.rank:.2f}",
                "costs": [
                    "–" if values[number] is None else f"{values[number]:.4g}" for values in costs.values()
                ],
                "improvements": [_improvement(cell) for cell in found.improvements[number]],
            }
            for number, row in enumerate(found.rows)
        ],
    }


def _footing_cell(row: equal_footing.Row, target: float) -> dict[str, str]:
    values = row.accuracies.get(target, [])
    rank = f", rank {row.ranks[target]:.2f}" if target in row.ranks else ""
    return {"value": _mean_sd(values), "note": f"n {len(values)}{rank}"}


def _improvement(cell: equal_footing.Improvement | None) -> dict[str, str]:
    if cell is None:
        return {"value": "", "note": ""}
    return {
        "value": f"{cell.value:.2f}",
        "note": "" if cell.low is None else f"{cell.low:.2f} to {cell.high:.2f}",
    }
