"""`python -m replications claims`: what each claim will compare in a profile, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.core.run import Run
from common.records import Record
from common.settings import ROOT, DataError
from common.stage import pipeline
from common.stage.papers import load, papers
from common.stage.scheduler import in_order
from common.statistics import claims, inference
from common.statistics.comparisons import find
from common.statistics.deciding import REPLICATED, Judged, families
from common.statistics.records import Records, place
from common.statistics.soundness import absent
from common.statistics.testing import FEWEST_PAIRS


@dataclass(frozen=True)
class Foreseen:
    """Of one claim in one profile.

    comparisons: how many it makes. seeds: of each that has runs. level: that it faces for `replicated` before others of its role are.
    effect: the smallest mean difference, in standard deviations of a pair, that is shown with power 0.8 then; None for
    tests of another kind. problems: what is not run.
    """

    paper: str
    claim: str
    role: str
    comparisons: int
    seeds: int
    level: float | None
    effect: float | None
    problems: tuple[str, ...]


def foreseen(paper: str, runs: Sequence[Run], file: claims.ClaimsFile) -> list[Foreseen]:
    """The claims of a paper, with these runs planned; deviations that are not run are left out."""
    records = Records([_record(run) for run in in_order(runs)])
    judged = [Judged(claim, find(claim, records)) for claim in file.claims]
    for family in families(judged, inference.ALPHA):
        for one in family.claims:
            one.level = {REPLICATED: family.level(one, REPLICATED)}
    found = []
    for one in judged:
        unseen = records.above(one.claim.seen)
        possible = [comparison for comparison in one.comparisons if comparison.problem is None]
        if one.claim.deviation and not possible:
            continue
        lacking = [q for comparison in possible for q in comparison.quantities if not unseen.seeds(q)]
        usable = [comparison for comparison in possible if not set(lacking) & set(comparison.quantities)]
        problems = [comparison.problem for comparison in one.comparisons if comparison.problem]
        problems += [f"no run of {place(quantity)}" for quantity in lacking]
        problems += [missing for comparison in usable for missing in absent(comparison, records)]
        seeds = min((len(unseen.seeds(q)) for c in usable for q in c.quantities), default=0)
        if 0 < seeds < FEWEST_PAIRS:
            problems.append(f"too few seeds: no verdict from fewer than {FEWEST_PAIRS}")
        level = one.level.get(REPLICATED)
        effect = None
        if level and seeds >= FEWEST_PAIRS and one.claim.test not in ("sign", "diversity", "count"):
            per_end = level / one.divisor(REPLICATED) / (2 if one.claim.test == "difference" else 1)
            effect = inference.detectable(seeds, per_end)
        names = (paper, one.claim.id, one.claim.role)
        problems = list(dict.fromkeys(problems))
        found.append(Foreseen(*names, len(one.comparisons), seeds, level, effect, tuple(problems)))
    return found


def _record(run: Run) -> Record:
    return Record(**run.identity, status="ok", settings_hash=run.settings_hash)


def table(params: str, profile_name: str | None) -> str:
    """What to print for a profile. Raises SettingsError."""
    lines = []
    for paper in papers():
        profile = load(paper, params, profile_name)
        file = claims.read(ROOT / "replications" / paper / claims.CLAIMS_FILE)
        try:
            found = foreseen(paper, pipeline.listed(paper, profile), file)
        except DataError as error:
            lines += [f"{paper}: {error}", ""]
            continue
        lines.append(f"{paper}, profile {profile.name}")
        for one in found:
            effect = "" if one.effect is None else f", shows {one.effect:.2f} sd"
            level = "" if one.level is None else f" at {one.level:.2g}"
            plural = "" if one.comparisons == 1 else "s"
            lines.append(
                f"  {one.claim:<24} {one.role:<10} {one.comparisons:>2} comparison{plural} of {one.seeds} seeds"
                f"{level}{effect}"
            )
            lines += [f"    {problem}" for problem in one.problems]
        lines.append("")
    return "\n".join(lines).rstrip()
