"""All profiles that have verdicts on one page: headlines down, profiles across, and the ledger of deviations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.report import figures, page
from common.report import verdicts as judgement
from common.report.evidence import EQUAL_FOOTING, ReportError
from common.report.judged import ClaimView, view
from common.report.numbers import amount
from common.report.panels import VERDICTS, ScaleCell, ScalesPanel
from common.report.pooling import Pooled, pool
from common.settings import SettingsError
from common.statistics.claims import CLAIMS_FILE, Claim, ClaimsFile, read_all
from common.statistics.deciding import NOT_TESTED


@dataclass(frozen=True)
class Scale:
    """The verdicts of one profile. older: papers that were judged on other claims than the files now hold."""

    profile: str
    papers: Mapping[str, Mapping[str, Any]]
    older: frozenset[str]
    has_page: bool


@dataclass(frozen=True)
class Ledger:
    """The deviations that a profile judges, each with its paper, in the order of the claims."""

    scale: Scale
    deviations: tuple[tuple[str, ClaimView], ...]


@dataclass(frozen=True)
class Row:
    """One headline at all scales; a view is None where a profile does not judge it."""

    paper: str
    claim: Claim
    cells: tuple[ClaimView | None, ...]
    pooled: dict[str, str] | None


def write(reports: Path, replications: Path) -> int:
    """Write `index.html` and `overview.png` into the folder of reports; returns the number of profiles.

    Every folder in it that holds a verdicts.json is a profile. One that judges more deviations than headlines is a ledger,
    which has the runs of another profile and a few more, so it is no scale of its own. Raises ReportError, OSError.
    """
    try:
        files = read_all(sorted(replications.glob(f"*/{CLAIMS_FILE}")))
        profiles = [_scale(path, files) for path in sorted(reports.glob("*/verdicts.json"))]
    except SettingsError as error:
        raise ReportError(str(error)) from error
    files.sort(key=_order)
    found, ledgers = [], []
    for scale in profiles:
        deviations = _ledger(scale, files)
        if len(deviations.deviations) > _headlines(scale, files):
            ledgers.append(deviations)
        else:
            found.append(scale)
    rows = [row for file in files for row in _rows(file, found)]
    text = (
        page.templates()
        .get_template("scales.html.j2")
        .render(scales=found, rows=rows, counts=_counts(rows), ledgers=ledgers)
    )
    (reports / "index.html").write_text(text, encoding="utf-8")
    (reports / "overview.png").write_bytes(figures.png(_panel(found, rows)))
    return len(profiles)


def _ledger(scale: Scale, files: Sequence[ClaimsFile]) -> Ledger:
    found = (
        (file.paper, view(claim, entry, file.paper, scale.profile))
        for file in files
        for claim in file.claims
        if claim.deviation is not None and (entry := _entry(scale, file.paper, claim))
    )
    return Ledger(scale, tuple((paper, shown) for paper, shown in found if shown.verdict != NOT_TESTED))


def _headlines(scale: Scale, files: Sequence[ClaimsFile]) -> int:
    """How many headlines the profile has an answer to."""
    judged = (_entry(scale, file.paper, c) for file in files for c in file.claims if c.role == "headline")
    return sum(entry is not None and entry["verdict"] != NOT_TESTED for entry in judged)


def _order(file: ClaimsFile) -> tuple[bool, str]:
    """The papers first, then what compares them."""
    return file.paper == EQUAL_FOOTING, file.paper


def _scale(path: Path, files: Sequence[ClaimsFile]) -> Scale:
    papers = judgement.read(path)["papers"]
    older = frozenset(
        file.paper
        for file in files
        if file.paper in papers and papers[file.paper].get("claims_digest") != file.digest
    )
    return Scale(path.parent.name, papers, older, (path.parent / "index.html").is_file())


def _rows(file: ClaimsFile, found: Sequence[Scale]) -> Iterator[Row]:
    for claim in file.claims:
        if claim.role != "headline":
            continue
        judged = [_entry(scale, file.paper, claim) for scale in found]
        cells = tuple(
            view(claim, entry, file.paper, scale.profile) if entry else None
            for scale, entry in zip(found, judged, strict=True)
        )
        yield Row(file.paper, claim, cells, _pooled(claim, judged))


def _entry(scale: Scale, paper: str, claim: Claim) -> Mapping[str, Any] | None:
    """The profile's verdict on the claim; one on an older claim of that name that asked something else does not count."""
    judged = scale.papers.get(paper, {}).get("claims", [])
    found = next((entry for entry in judged if entry["id"] == claim.id), None)
    if found is None or (found["test"], found["metric"]) != (claim.test, claim.metric):
        return None
    return found


def _pooled(claim: Claim, judged: Sequence[Mapping[str, Any] | None]) -> dict[str, str] | None:
    """The pooled estimate over all cells in words, None with too few of them."""
    if claim.test not in judgement.POOLED:
        return None
    ratio = claim.scale == "ratio"
    effects = list(_cells(judged, ratio).values())
    found = pool([effect for effect, _ in effects], [error for _, error in effects])
    return None if found is None else _words(claim, found, ratio)


def _words(claim: Claim, found: Pooled, ratio: bool) -> dict[str, str]:
    def shown(value: float, unit: bool = True) -> str:
        return amount(claim, math.exp(value) if ratio else value, unit=unit)

    return {
        "estimate": shown(found.estimate),
        "interval": f"{shown(found.low, False)} to {shown(found.high)}",
        "prediction": f"{shown(found.predicted_low, False)} to {shown(found.predicted_high)}",
        "heterogeneity": f"I² {100 * found.i2:.0f} %, p {found.p:.2g}",
        "cells": str(found.cells),
    }


def _cells(
    judged: Sequence[Mapping[str, Any] | None], ratio: bool
) -> dict[tuple[str, str], tuple[float, float]]:
    """(data set, architecture) -> mean effect and its standard error, of the profile with most seeds there.

    The comparisons of one cell share their networks, so that a seed's effect is its mean over them.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for entry in judged:
        by_cell: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for comparison in entry["comparisons"] if entry else ():
            if comparison["values"] and comparison["dataset"]:
                by_cell.setdefault((comparison["dataset"], comparison["architecture"]), []).append(comparison)
        for cell, comparisons in by_cell.items():
            seeds = set.intersection(*(set(one["seeds"]) for one in comparisons))
            values = [
                [
                    math.log(v) if ratio else v
                    for s, v in zip(one["seeds"], one["values"], strict=True)
                    if s in seeds
                ]
                for one in comparisons
            ]
            means = np.mean(values, axis=0).tolist() if seeds else []
            if len(means) > max(1, len(found.get(cell, ()))):
                found[cell] = means
    errors = {cell: float(np.std(means, ddof=1)) / math.sqrt(len(means)) for cell, means in found.items()}
    return {cell: (float(np.mean(means)), errors[cell]) for cell, means in found.items() if errors[cell] > 0}


def _counts(rows: Sequence[Row]) -> list[dict[str, int]]:
    """By profile, how often each verdict was reached."""
    columns = zip(*(row.cells for row in rows), strict=True) if rows else ()
    return [
        {
            verdict: sum(cell is not None and cell.verdict == verdict for cell in column)
            for verdict in VERDICTS
        }
        for column in columns
    ]


def _panel(found: Sequence[Scale], rows: Sequence[Row]) -> ScalesPanel:
    def drawn(row: Row, scale: Scale, cell: ClaimView | None) -> ScaleCell:
        # a picture has no room to say that a verdict is on an older version of the claim
        if cell is None or row.paper in scale.older:
            return ScaleCell(None, "", "")
        return ScaleCell(cell.verdict, cell.estimate, cell.interval)

    shown = tuple(
        (
            row.paper,
            row.claim.statement,
            tuple(drawn(row, scale, cell) for scale, cell in zip(found, row.cells, strict=True)),
        )
        for row in rows
    )
    return ScalesPanel(
        "overview",
        "Overview",
        "Do the papers' headline claims hold?",
        "Verdict and estimate of every headline at every scale.",
        tuple(scale.profile for scale in found),
        shown,
    )
