"""What it would take to decide the claims that are open: seeds, from the statistics, and device time, from the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.core.run import Run
from common.settings import Profile
from common.stage.looks import claims_file, with_needs
from common.stage.recorded import Recorded


@dataclass(frozen=True)
class Need:
    """An open claim. have, seeds: how many seeds it is judged by, and would need for power 0.8 at the level that it faces.

    seeds: None where no number decides it, or none can be told; why says so. runs: what it compares with one seed, by the
    hash of the runs of the first seed, and the seconds that each took. more: seeds times seconds, of what is missing.
    """

    paper: str
    claim: str
    role: str
    have: int
    seeds: int | None
    structural: bool
    why: str
    runs: Mapping[str, float]

    @property
    def missing(self) -> int:
        """How many more seeds it needs."""
        return max(0, (self.seeds or 0) - self.have)

    @property
    def seconds(self) -> float:
        """Seconds of a worker for these."""
        return self.missing * sum(self.runs.values())


def needs(paper: str, profile: Profile, runs: Sequence[Run], here: Recorded) -> list[Need]:
    """The paper's open claims by its records. Raises SettingsError, ModuleNotFoundError without SciPy."""
    from common.statistics.buying import open_places
    from common.statistics.records import Records, place_of
    from common.statistics.verdicts import judge

    file = claims_file(paper)
    if file is None:
        return []
    looks = profile.looks if len(profile.looks) > 1 else ()
    records = Records([here.records[run.settings_hash] for run in runs if run.settings_hash in here.records])
    places = open_places(file, records, looks)
    first = [run for run in runs if run.seed == profile.paper.seeds[0]]
    found = []
    for claim in judge([file], {paper: records}, looks)["papers"][paper]["claims"]:
        if claim["id"] not in places:
            continue
        compared = with_needs([run for run in first if place_of(run) in places[claim["id"]]], runs)
        seconds = {
            run.settings_hash: here.environment["seconds"].get(run.settings_hash, 0.0)
            for run in compared
            if run.seed == profile.paper.seeds[0]  # what all seeds share is there already
        }
        have = max(comparison["n"] for comparison in claim["comparisons"])
        structural = claim["kind"] == "structural"
        why = claim["reason"].rpartition("; ")[2] if claim["needs"] is None else ""
        found.append(Need(paper, claim["id"], claim["role"], have, claim["needs"], structural, why, seconds))
    return found


def together(found: Sequence[Need]) -> float:
    """Seconds of a worker for all that can be decided: a run that several claims compare is counted once a seed."""
    longest: dict[str, float] = {}
    for need in found:
        for name, seconds in need.runs.items():
            longest[name] = max(longest.get(name, 0.0), need.missing * seconds)
    return sum(longest.values())
