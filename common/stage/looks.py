"""Look by look: which runs a stage trains first, and which ones its open claims need then.

The first look is every run of the first seeds. What the next one needs, statistics says (`common.statistics.buying`),
which needs SciPy; with one look it is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.core.run import Run
from common.records import Identity, Record, read
from common.settings import ROOT, Profile
from common.stage.scheduler import in_order
from common.stage.store import StageError
from common.statistics import claims


def first_look(runs: Sequence[Run], profile: Profile) -> list[Run]:
    """Of all runs of a paper, in order, those of the first look and what they need."""
    later = set(profile.paper.seeds[profile.looks[0] :])
    return with_needs([run for run in runs if run.seed not in later], runs)


def with_needs(chosen: Iterable[Run], runs: Sequence[Run]) -> list[Run]:
    """Some of the runs and all that they need, in the order of `runs`, which hold them."""
    hashes = {run.settings_hash for run in in_order(list(chosen))}
    return [run for run in runs if run.settings_hash in hashes]


def claims_of(paper: str, profile: Profile) -> claims.ClaimsFile | None:
    """The claims by which a paper's looks go on; None with one look, or without claims. Raises SettingsError."""
    return claims_file(paper) if len(profile.looks) > 1 else None


def claims_file(paper: str) -> claims.ClaimsFile | None:
    """What a paper claims; None if it has no claims. Raises SettingsError."""
    file = ROOT / "replications" / paper / claims.CLAIMS_FILE
    return claims.read(file) if file.exists() else None


def next_look(
    file: claims.ClaimsFile | None, runs: Sequence[Run], profile: Profile, records: Iterable[Record]
) -> list[Run]:
    """The runs that open claims wait for, judged by these records; recorded ones may be among them.

    Raises ModuleNotFoundError without SciPy.
    """
    if file is None:
        return []
    from common.statistics.buying import wanted
    from common.statistics.records import Place, Records, place_of

    listed: dict[Place, set[int]] = {}
    for run in runs:
        listed.setdefault(place_of(run), set()).add(run.seed)
    found = wanted(file, Records(list(records)), profile.looks, listed)
    return [run for run in runs if (place_of(run), run.seed) in found]


def read_list(file: Path, runs: Sequence[Run]) -> list[Run]:
    """The runs that a list names, as `python -m replications open` writes it. Raises StageError, SettingsError."""
    known = {tuple(run.identity.values()): run for run in runs}
    found = []
    for where, named in read(file, Identity):
        run = known.get(tuple(named.identity.values()))
        if run is None:
            raise StageError(f"{where}: {named.name} is not listed here")
        found.append(run)
    if not found:
        raise StageError(f"{file}: names no run")
    return found
