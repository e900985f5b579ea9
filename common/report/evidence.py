"""Everything the report draws, read once: records, curves, claims, deviations, verdicts and the environment.

Knows no paper: a paper is a folder with a `claims.yaml`, or records that name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.reading import read_text
from common.records import CURVES_SUFFIX, Curves, Environment, Record, is_number, read
from common.records import files as record_files
from common.report import verdicts as judgement
from common.settings import SettingsError
from common.statistics.claims import CLAIMS_FILE, Claim, ClaimsFile, read_all

EQUAL_FOOTING = "equal_footing"
"""Name of the paper, and of the tag in `details`, of records that compare all methods with each other."""


class ReportError(Exception):
    """Input from which no report can be drawn; the message is one clear line."""


_MOST_README = 2**17
"""Bytes of a paper's README."""


@dataclass(frozen=True)
class Paper:
    """One paper's evidence; every part may be missing except the name."""

    name: str
    title: str
    claims: tuple[Claim, ...] = ()
    arithmetic: tuple[dict[str, Any], ...] = ()
    """Numbers that settings fix, with their values, as the verdicts hold them."""
    claims_file: str | None = None
    claims_digest: str | None = None
    """SHA-256 of the bytes of `claims.yaml`."""
    judged_digest: str | None = None
    """Digest of the claims that the verdicts belong to."""
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Claim id -> its entry in the verdicts file."""
    deviations: str | None = None
    """Markdown below the heading `Deviations` of the paper's README."""
    records: list[Record] = field(default_factory=list)
    environment: dict[str, Any] | None = None

    @property
    def failed(self) -> list[Record]:
        return [r for r in self.records if r.status == "failed" and not r.is_lost_trial]

    @property
    def lost_trials(self) -> list[Record]:
        return [record for record in self.records if record.is_lost_trial]

    @property
    def stale(self) -> bool:
        """Whether the verdicts were judged on other claims than the file now holds."""
        return (
            None not in (self.claims_digest, self.judged_digest) and self.claims_digest != self.judged_digest
        )


@dataclass(frozen=True)
class Evidence:
    """What one report is drawn from."""

    profile: str
    alpha: float | None
    papers: list[Paper]
    curves: dict[str, list[dict[str, Any]]]
    """`settings_hash` of a run -> its per-epoch measurements."""


def load(profile: str, results: Path, replications: Path, verdicts: Path, environment: Path) -> Evidence:
    """Read all inputs of a report.

    `results` holds `<paper>.jsonl` and `<paper>.curves.jsonl`, `replications` one folder a paper, and
    `environment` perhaps `<paper>.json`. Raises ReportError, naming file and line, for what is missing or
    damaged.
    """
    try:
        return _loaded(profile, results, replications, verdicts, environment)
    except SettingsError as error:
        raise ReportError(str(error)) from None


def _loaded(profile: str, results: Path, replications: Path, verdicts: Path, environment: Path) -> Evidence:
    judged = judgement.read(verdicts)
    for folder in (results, replications):
        if not folder.is_dir():
            raise ReportError(f"{folder}: no such folder")
    records: dict[str, list[Record]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for path in record_files(results):
        for _, record in read(path, Record):
            records.setdefault(record.paper, []).append(record)
    for path in sorted(results.glob(f"*{CURVES_SUFFIX}")):
        curves |= {line.settings_hash: line.curves for _, line in read(path, Curves)}
    files = {file.paper: file for file in read_all(sorted(replications.glob(f"*/{CLAIMS_FILE}")))}
    # the papers first, then what compares them
    names = sorted(files.keys() | records.keys(), key=lambda name: (name == EQUAL_FOOTING, name))
    if not names:
        raise ReportError(
            f"no paper to report: no folder in {replications} has a claims.yaml and {results} has no records"
        )
    papers = [
        _paper(name, files.get(name), records.get(name, []), judged["papers"].get(name, {}), environment)
        for name in names
    ]
    return Evidence(profile, judged.get("alpha"), papers, curves)


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing or no measurement."""
    return float(value) if is_number(value) else None


def _paper(
    name: str,
    file: ClaimsFile | None,
    records: list[Record],
    judged: Mapping[str, Any],
    environment: Path,
) -> Paper:
    paper = Paper(
        name=name,
        title=name,
        records=records,
        judged={claim["id"]: claim for claim in judged.get("claims", [])},
        arithmetic=tuple(judged.get("arithmetic", ())),
        judged_digest=judged.get("claims_digest"),
        environment=_environment(environment / f"{name}.json"),
    )
    if file is None:
        return paper
    readme = file.path.parent / "README.md"
    text = read_text(readme, _MOST_README) if readme.exists() else ""
    title = re.search(r"^# +(.+?) *$", text, flags=re.MULTILINE)
    deviations = re.search(
        r"^## +Deviations\b[^\n]*\n(.*?)(?=^#{1,2} |\Z)", text, flags=re.MULTILINE | re.DOTALL
    )
    return replace(
        paper,
        title=title.group(1) if title else name,
        claims=file.claims,
        claims_file=file.path.as_posix(),
        claims_digest=file.digest,
        deviations=deviations.group(1).strip() if deviations else None,
    )


def _environment(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return judgement.document(path, Environment)
