"""The page of one profile: answers first, then what supports them, then all the rest, folded."""

from __future__ import annotations

import itertools
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from common.naming import EXPERIMENT, slug
from common.reading import words
from common.records import TRIAL, Record
from common.report import equal_footing, markdown, tables
from common.report.evidence import EQUAL_FOOTING, Evidence, Paper
from common.report.figures import Drawn
from common.report.judged import ClaimView, counted
from common.report.numbers import short
from common.report.panels import VERDICTS, percent

FULL_SCALE = "paper"
"""The one profile whose numbers stand beside a paper's own."""
SHOWN_FIGURES = 2
"""Figures of a paper's runs that stand unfolded."""
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Paths:
    """What a page is drawn from and where, as the commands on it name them."""

    results: Path
    replications: Path
    verdicts: Path
    out: Path


def templates() -> jinja2.Environment:
    """The templates of all pages, with what they share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "style": (_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        "script": (_TEMPLATES / "page.js").read_text(encoding="utf-8"),
        "symbols": VERDICTS,
        "quoted": quote,
    }
    return environment


def render(
    evidence: Evidence,
    views: Mapping[str, Sequence[ClaimView]],
    figures: Mapping[str, Sequence[Drawn]],
    paths: Paths,
    single_file: bool,
) -> str:
    """The page as HTML.

    views: paper -> its claims. figures: paper, `<paper>/<claim id>` or `<EQUAL_FOOTING>/figures` -> drawings.
    single_file: whether all figures and their data stand in the page itself.
    """
    records = equal_footing.tagged(evidence.papers)
    found = [view for paper in views.values() for view in paper]
    headlines = [view for view in found if view.claim.role == "headline"]
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            single_file=single_file,
            profile=evidence.profile,
            alpha=evidence.alpha,
            full_scale=evidence.profile == FULL_SCALE,
            runs=sum(len(paper.records) - len(paper.failed) for paper in evidence.papers),
            failed=sum(len(paper.failed) for paper in evidence.papers),
            claims=len(found),
            headlines=len(headlines),
            counts=_counts(headlines),
            all_counts=_counts(found),
            kinds=counted(found),
            papers=[
                _paper(paper, views[paper.name], figures, evidence.profile, paths)
                for paper in evidence.papers
            ],
            footing_figures=figures.get(f"{EQUAL_FOOTING}/figures", ()),
            own_footing=any(paper.name == EQUAL_FOOTING for paper in evidence.papers),
            footings=[tables.footing(one) for one in equal_footing.footings(records, evidence.papers)],
        )
    )


def _counts(found: Sequence[ClaimView]) -> dict[str, int]:
    counts = Counter(view.verdict for view in found)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _paper(
    paper: Paper,
    found: Sequence[ClaimView],
    figures: Mapping[str, Sequence[Drawn]],
    profile: str,
    paths: Paths,
) -> dict[str, Any]:
    records_file = paths.results / f"{paper.name}.jsonl"
    own = figures.get(paper.name, ())
    # of the comparison, figures of all methods come first
    shown = 0 if paper.name == EQUAL_FOOTING else SHOWN_FIGURES
    probes = [view for view in found if view.claim.role == "probe"]
    return {
        "name": paper.name,
        "anchor": slug(paper.name),
        "title": paper.title,
        "runs": len(paper.records) - len(paper.failed),
        "scale": scale(paper.records),
        "redrawn": redrawn(paper.records),
        "lost_trials": [_run_name(record) for record in paper.lost_trials],
        "failed": [
            {"name": _run_name(record), "reason": record.reason or "no reason given"}
            for record in paper.failed
        ],
        "counts": _counts(found),
        "headlines": [view for view in found if view.claim.role == "headline"],
        "supporting": [view for view in found if view.claim.role == "supporting"],
        "probes": [view for view in probes if view.claim.deviation is None],
        "ledger": [view for view in probes if view.claim.deviation is not None],
        "figures_of": {view.claim.id: figures.get(f"{paper.name}/{view.claim.id}", ()) for view in found},
        "arithmetic": [row for entry in paper.arithmetic for row in _arithmetic(entry)],
        "seen": max((view.claim.seen for view in found), default=-1),
        "stale": paper.stale,
        "claims_file": paper.claims_file,
        "claims_digest": paper.claims_digest,
        "figures": own[:shown],
        "more_figures": _by_heading(own[shown:]),
        "tables": tables.accuracies(paper),
        "deviations": markdown.html(paper.deviations) if paper.deviations else None,
        "commands": _commands(paper, profile, paths, records_file),
        "experiment": EXPERIMENT.format(paper=paper.name),
        "records_file": records_file.as_posix(),
        "environment": _environment(paper.environment),
    }


def scale(records: Sequence[Record]) -> str:
    """In one sentence: data, networks, targets, epochs and seeds of a paper's runs."""
    shown = [record for record in records if record.status == "ok"]
    if not shown:
        return ""
    train: dict[str, set[int]] = {}
    for record in shown:
        images = _table(record.settings.get("data")).get("train")
        train.setdefault(record.dataset, set()).update([images] if isinstance(images, int) else [])
    data = [
        name + (f" ({max(images):,} training images)" if images else "") for name, images in train.items()
    ]
    networks = dict.fromkeys(record.architecture for record in shown)
    epochs = [
        found
        for record in shown
        if isinstance(found := _table(record.settings.get("training")).get("epochs"), int)
    ]
    seeds = {record.seed for record in shown if not record.variant.startswith(TRIAL)}
    targets = sorted({record.target for record in shown if record.target})
    parts = [f"{', '.join(data)}; {', '.join(networks)}"]
    if targets:
        ends = dict.fromkeys(percent(target) for target in (targets[0], targets[-1]))
        parts.append(f"targets {' to '.join(ends)}")
    if epochs:
        parts.append(f"up to {max(epochs)} epochs")
    parts.append(f"{len(seeds)} seed{'s' * (len(seeds) != 1)}")
    return "; ".join(parts)


def _table(value: Any) -> Mapping[str, Any]:
    """A table of a record's settings; empty where these have another form."""
    return value if isinstance(value, Mapping) else {}


def redrawn(records: Sequence[Record]) -> str:
    """What a seed of a paper's runs draws or chooses for itself, and what all seeds share."""
    splits = {str(_table(record.settings.get("data")).get("split")) for record in records}
    trials = {record.seed for record in records if record.variant.startswith(TRIAL)}
    seeds = {record.seed for record in records if not record.variant.startswith(TRIAL)}
    parts = []
    if splits == {"per_seed"}:
        parts.append("Each seed has training and validation images of its own, and the same test images.")
    elif splits == {"shared"}:
        parts.append("All seeds share their training, validation and test images.")
    if trials:
        parts.append(
            "Settings are chosen anew with each seed."
            if trials <= seeds
            else "Settings are chosen once for all seeds, with seeds of their own."
        )
    return " ".join(parts)


def _arithmetic(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a cell and value: where, and the number or its range over the seeds."""
    factor, unit = (100.0, " %") if entry["scale"] == "points" else (1.0, "")
    rows: dict[tuple[str, str], list[str]] = {}
    for found in entry["values"]:
        ends = dict.fromkeys(short(factor * found[end]) for end in ("low", "high"))
        targets = rows.setdefault(
            (f"{found['dataset']}, {found['architecture']}", " to ".join(ends) + unit), []
        )
        targets += [percent(found["target"]).removesuffix(" %")] if found["target"] else []
    return [
        {
            "statement": entry["statement"],
            "note": entry["note"] or "",
            "where": place + (f", at {', '.join(targets)} %" if targets else ""),
            "value": value,
        }
        for (place, value), targets in rows.items()
    ]


def _by_heading(figures: Sequence[Drawn]) -> list[tuple[str, list[Drawn]]]:
    return [
        (heading, list(group))
        for heading, group in itertools.groupby(figures, key=lambda figure: figure.heading)
    ]


def _run_name(record: Record) -> str:
    """A run as its paper names it, for lists."""
    return "{variant}, {dataset}, {architecture}, target {target}, seed {seed}".format(**record.identity)


def _commands(paper: Paper, profile: str, paths: Paths, records_file: Path) -> str:
    def command(module: str, **options: str) -> str:
        return " \\\n    ".join(
            [f"python -m {module}", *(f"--{name} {shlex.quote(value)}" for name, value in options.items())]
        )

    records_path = records_file.as_posix()
    parts = [f"# trains what is missing and writes {words(records_path)}\ndvc repro {paper.name}"]
    if paper.claims_file:
        judge = command(
            "common.statistics", records=records_path, claims=paper.claims_file, out="verdicts.json"
        )
        parts.append(f"# judges this paper's claims alone: estimates, intervals, p-values, verdicts\n{judge}")
    where = {name: path.as_posix() for name, path in vars(paths).items()}
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
