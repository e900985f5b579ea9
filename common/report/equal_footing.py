"""Equal footing: every method and control at common costs, on the same data, seeds and training epochs.

Takes records whose `details.equal_footing` is true, and all records of a paper called `equal_footing`. What
it computes is descriptive; the comparisons that are judged are claims like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.naming import slug
from common.records import TRIAL, Record
from common.report.evidence import EQUAL_FOOTING, Paper
from common.report.gathering import Looks, Targets, cost_panel, gather, measured, reference
from common.report.panels import CONFIDENCE, ImprovementPanel, Panel, Profile, ProfilesPanel
from common.statistics import inference

Accuracies = Mapping[float, Mapping[int, float]]
"""Target -> seed -> test accuracy in %."""
RESAMPLES = 2000
LEVELS = 60
"""Points of a performance profile."""
FEWEST_SEEDS = 5
"""Below this many seeds a bootstrap interval says too little to be shown."""


@dataclass(frozen=True)
class Improvement:
    """Probability that a run of one method beats a run of another, with its bootstrap interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """One method. accuracies, ranks: by target; None where not every method finished there."""

    method: str
    accuracies: dict[float, list[float]]
    ranks: dict[float, float]
    rank: float | None
    seconds: float | None
    training_macs: float | None


@dataclass(frozen=True)
class Footing:
    """All methods of one cell.

    improvements: [row beats column], None on the diagonal or without common seeds.
    """

    place: str
    targets: tuple[float, ...]
    seeds: int
    rows: tuple[Row, ...]
    improvements: tuple[tuple[Improvement | None, ...], ...]


def tagged(papers: Sequence[Paper]) -> list[Record]:
    """The records on equal footing without trials; where several papers take part, variants bear the paper's name too."""
    found = [
        record
        for paper in papers
        for record in paper.records
        if paper.name == EQUAL_FOOTING or record.details.get(EQUAL_FOOTING) is True
        if not record.variant.startswith(TRIAL)
    ]
    if len({record.paper for record in found}) < 2:
        return found
    return [record.model_copy(update={"variant": f"{record.paper}: {record.variant}"}) for record in found]


def panels(records: Sequence[Record]) -> list[Panel]:
    """All methods on common axes, trained networks only: profiles, improvement, and accuracy against costs."""
    drawn: list[Panel] = []
    for (dataset, architecture), cell in gather(r for r in records if not _interpolated(r)).items():
        reference_level = reference(cell)
        compared = [method for method in cell if method != reference_level]
        look: dict[str, int | None] = {method: number for number, method in enumerate(compared)}
        stem, place = (
            f"{slug(EQUAL_FOOTING)}-all-{slug(dataset)}-{slug(architecture)}",
            f"{dataset} · {architecture}",
        )
        if len(compared) > 1:
            drawn += _over_targets(stem, place, {method: cell[method] for method in compared}, look)
        look |= {reference_level: None} if reference_level else {}
        for cost in ("parameters", "macs"):
            panel = cost_panel(f"{stem}-{cost}", place, place, cost, cell, look)
            drawn += [panel] if panel else []
    return drawn


def _over_targets(stem: str, place: str, cell: Mapping[str, Targets], look: Looks) -> list[Panel]:
    """Performance profiles, and the probability of improvement on the method of the best mean rank."""
    found = _footing(place, cell, {})
    profiles = {method: _profile_values(targets) for method, targets in cell.items()}
    profiles = {method: values for method, values in profiles.items() if values.size}
    drawn: list[Panel] = []
    if profiles:
        every = np.concatenate([values.ravel() for values in profiles.values()])
        levels = np.linspace(every.min(), every.max(), LEVELS)
        lines = tuple(_profile(method, look[method], values, levels) for method, values in profiles.items())
        best = max(lines, key=lambda line: float(line.shares.mean()))
        drawn.append(
            ProfilesPanel(
                f"{stem}-profiles",
                place,
                f"{best.label} keeps the most accuracy over all targets ({place})",
                "Performance profiles: share of runs, over all targets and seeds, that reach at least an accuracy τ; "
                "bands are 95 % bootstrap intervals over seeds (Agarwal et al. 2021).",
                levels,
                lines,
            )
        )
    ranked = [row for row in found.rows if row.rank is not None]
    if len(ranked) > 1:
        drawn += _improvement_panel(stem, place, found, min(ranked, key=lambda row: row.rank or 0.0), look)
    return drawn


def _improvement_panel(stem: str, place: str, found: Footing, best: Row, look: Looks) -> list[Panel]:
    column = found.rows.index(best)
    rows = []
    for number, row in enumerate(found.rows):
        cell = found.improvements[number][column]
        if cell is not None:
            rows.append((row.method, look[row.method], cell.value, cell.low, cell.high))
    if not rows:
        return []
    surely = sum(1 for *_, high in rows if high is not None and high < 0.5)
    return [
        ImprovementPanel(
            f"{stem}-improvement",
            place,
            f"{best.method} ranks best; {surely} of {len(rows)} others surely lose to it more often than not ({place})",
            "Probability of improvement, averaged over targets, with 95 % bootstrap intervals over seeds, not corrected "
            "for many pairs.",
            best.method,
            tuple(sorted(rows, key=lambda row: -row[2])),
        )
    ]


def _profile_values(targets: Targets) -> np.ndarray:
    """Accuracies in % of the seeds that finished at every target: [seeds, targets]."""
    found = [
        {r.seed: 100 * a for r in runs if (a := measured(r, "test_accuracy")) is not None}
        for runs in targets.values()
    ]
    seeds = sorted(set.intersection(*map(set, found))) if found else []
    return np.array([[at[seed] for at in found] for seed in seeds])


def _profile(method: str, look: int | None, values: np.ndarray, levels: np.ndarray) -> Profile:
    reached = 100.0 * (values[:, :, None] >= levels).mean(axis=1)
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(reached[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return Profile(method, look, reached.mean(axis=0), low, high)


def footings(records: Sequence[Record], papers: Sequence[Paper]) -> list[Footing]:
    """Ranks, probabilities of improvement and training cost.

    One a cell at common targets, and one at common MACs where records hold interpolated values.
    """
    seconds = {
        key: value
        for paper in papers
        for key, value in ((paper.environment or {}).get("seconds") or {}).items()
    }
    found = []
    for at_macs in (False, True):
        for (dataset, architecture), cell in gather(
            r for r in records if _interpolated(r) == at_macs
        ).items():
            methods = {method: targets for method, targets in cell.items() if method != reference(cell)}
            if len(methods) > 1:
                what = "at common MACs, interpolated between runs" if at_macs else "at common targets"
                found.append(_footing(f"{dataset} · {architecture}, {what}", methods, seconds))
    return found


def _interpolated(record: Record) -> bool:
    """Whether a record is no trained network, but read off between those at another cost."""
    return record.details.get("interpolated") is True


def _footing(place: str, cell: Mapping[str, Targets], seconds: Mapping[str, float]) -> Footing:
    values = {
        method: {
            target: {r.seed: 100 * a for r in runs if (a := measured(r, "test_accuracy")) is not None}
            for target, runs in targets.items()
        }
        for method, targets in cell.items()
    }
    targets = tuple(sorted({target for found in values.values() for target in found}))
    shared = {
        t: sorted(set.intersection(*(set(found.get(t, ())) for found in values.values()))) for t in targets
    }
    ranks = {
        t: inference.ranks([[-found[t][s] for s in seeds] for found in values.values()]).mean(axis=1)
        for t, seeds in shared.items()
        if seeds
    }
    rows = [
        Row(
            method=method,
            accuracies={t: list(found[t].values()) for t in targets if found.get(t)},
            ranks={t: float(mean[number]) for t, mean in ranks.items()},
            rank=float(np.mean([mean[number] for mean in ranks.values()])) if ranks else None,
            seconds=_average([seconds.get(r.settings_hash) for runs in cell[method].values() for r in runs]),
            training_macs=_average(
                [measured(r, "training_macs") for runs in cell[method].values() for r in runs]
            ),
        )
        for number, (method, found) in enumerate(values.items())
    ]
    improvements = tuple(
        tuple(None if a == b else _improvement(values[a], values[b], targets) for b in values) for a in values
    )
    return Footing(place, targets, min(map(len, shared.values())), tuple(rows), improvements)


def _improvement(first: Accuracies, second: Accuracies, targets: Sequence[float]) -> Improvement | None:
    """P(first > second) + P(equal) / 2 over pairs of runs, averaged over targets; seeds are resampled."""
    shared = [t for t in targets if t in first and t in second]
    seeds = sorted(set.intersection(*(set(first[t]) & set(second[t]) for t in shared))) if shared else []
    if not seeds:
        return None
    ours, theirs = (np.array([[found[t][s] for s in seeds] for t in shared]) for found in (first, second))
    wins = (ours[:, :, None] > theirs[:, None, :]) + 0.5 * (ours[:, :, None] == theirs[:, None, :])
    wins, n = wins.mean(axis=0), len(seeds)
    if n < FEWEST_SEEDS:
        return Improvement(float(wins.mean()), None, None)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    resampled = np.einsum("bi,ij,bj->b", counts, wins, counts) / n**2
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Improvement(float(wins.mean()), float(low), float(high))


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
