"""`python -m replications plan`: what each stage of a profile holds, costs on this machine, and has done already."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from common.core.compute import Compute
from common.core.run import Run
from common.reading import words
from common.settings import DataError, Profile, SettingsError, hint
from common.stage import floors, looks, pipeline, rehearsal, tables
from common.stage.inspection import is_told, remarks
from common.stage.local import training_slots
from common.stage.needs import Need, needs, together
from common.stage.papers import load, papers, profile_datasets
from common.stage.recorded import Recorded, recorded
from common.stage.records import machine
from common.stage.rehearsal import Cost, Kind
from common.stage.store import SCRATCH, Store, code_digest

CONTINUES = "a machine that executes runs as these were goes on from them, another one trains all"


@dataclass(frozen=True)
class Stage:
    """What a profile plans for one paper.

    kinds: of its runs; empty if they cannot be listed yet. done: settings hashes of finished runs, None if that
    cannot be told yet. missing: which data is not there, and what prepares it. origins: what is said of the runs whose
    records are in the results, if they are of another device or not all.
    """

    paper: str
    kinds: list[Kind]
    done: set[str] | None = None
    missing: str | None = None
    origins: str | None = None
    open: Sequence[Need] = ()
    """Of its claims, as far as its first look is recorded."""

    @property
    def runs(self) -> int:
        """How many runs it has."""
        return sum(len(kind.members) for kind in self.kinds)


def stage(paper: str, profile: Profile, results: Path) -> Stage:
    """What the profile holds for a paper, and what of it is done. Raises SettingsError."""
    kinds: list[Kind] = []
    try:
        listed = pipeline.listed(paper, profile)
        left = recorded(results, profile.name, paper, code_digest(listed))
        # later looks are for open claims alone, so of those only what is there is planned
        first = {run.settings_hash for run in looks.first_look(listed, profile)}
        runs = [run for run in listed if run.settings_hash in (first | left.hashes if left else first)]
        kinds = rehearsal.kinds(runs)
        done = _done(paper, profile, runs, left)
        waiting = _open(paper, profile, listed, left) if left and first <= left.hashes else []
        return Stage(paper, kinds, done, None, _origins(left, runs, profile) if left else None, waiting)
    except DataError as error:
        return Stage(paper, kinds, missing=f"{error}; {pipeline.preparation(paper)} prepares what it reads")


def _open(paper: str, profile: Profile, runs: Sequence[Run], left: Recorded) -> list[Need]:
    try:
        return needs(paper, profile, runs, left)
    except ModuleNotFoundError:
        return []  # a machine without SciPy plans runs alone


def _done(paper: str, profile: Profile, runs: Sequence[Run], left: Recorded | None) -> set[str]:
    """Runs that are kept in the scratch folder, or that a complete stage has left in the results.

    Of a stage that is not complete, what was imported is in the scratch folder, too; there it is found where runs are
    executed as these were.
    """
    store = Store(SCRATCH / profile.name / paper, profile.execution)
    found = {run.settings_hash for run in runs if store.finished(run, needed=False)}
    if left and not left.unfinished:
        done = {name for name, record in left.records.items() if not record.may_pass}
        found |= done & {run.settings_hash for run in runs}
    return found


def _origins(left: Recorded, runs: Sequence[Run], profile: Profile) -> str | None:
    ours = left.hashes & {run.settings_hash for run in runs}
    devices = left.devices(ours)
    if not left.unfinished and set(devices) <= {machine(Compute.choose(profile.execution.device))["device"]}:
        return None
    origins = ", ".join(f"{count} from {device}" for device, count in sorted(devices.items()))
    partial = f"; they are not complete, {CONTINUES}" if left.unfinished else ""
    return f"the results hold {len(ours)} of {len(runs)} runs: {origins}{partial}"


@dataclass(frozen=True)
class Expected:
    """Of all runs of a stage: epochs, seconds of one worker, those of runs that are not done, bytes on disk."""

    epochs: float
    seconds: float
    left: float
    disk: float

    @classmethod
    def of(cls, stage: Stage, costs: Mapping[str, Cost]) -> Expected | None:
        """From the costs of its kinds, the others taken for the mean of these; None if there are none."""
        known = [(costs[kind.run.settings_hash], kind) for kind in stage.kinds if _is_known(kind, costs)]
        if not known:
            return None
        runs = sum(len(kind.members) for _, kind in known)
        mean = [
            sum(value(cost) * len(kind.members) for cost, kind in known) / runs
            for value in (attrgetter(name) for name in ("seconds", "epochs", "disk"))
        ]
        unknown = [(Cost(*mean), kind) for kind in stage.kinds if not _is_known(kind, costs)]
        each = [
            (cost, run.settings_hash in (stage.done or ()))
            for cost, k in known + unknown
            for run in k.members
        ]
        return cls(
            epochs=sum(cost.epochs for cost, _ in each),
            seconds=sum(cost.seconds for cost, _ in each),
            left=sum(cost.seconds for cost, done in each if not done),
            disk=sum(cost.disk for cost, _ in each),
        )


def _is_known(kind: Kind, costs: Mapping[str, Cost]) -> bool:
    cost = costs.get(kind.run.settings_hash)
    return cost is not None and cost.problem is None


def plan(
    params: str, profile_name: str | None, seconds: float, results: Path, card: str | None = None
) -> str:
    """What to print for a profile, after a rehearsal of about `seconds` seconds (0: none).

    card: one of `floors.CARDS`, to reckon for in place of this machine. Raises SettingsError.
    """
    if card and card not in floors.CARDS:
        raise SettingsError(f"--card {words(card)}: {hint(card, sorted(floors.CARDS))}")
    profiles = {paper: load(paper, params, profile_name) for paper in papers()}
    profile = next(iter(profiles.values()))
    stages = [stage(paper, own, results) for paper, own in profiles.items()]
    begun, costs = time.perf_counter(), {}
    if seconds > 0:
        ready = {stage.paper: stage.kinds for stage in stages if not stage.missing}
        peaks = floors.CARDS[card] if card else None
        costs = rehearsal.rehearse(ready, profile.execution, seconds, peaks)
    took = f"rehearsed in {time.perf_counter() - begun:.0f} s" if costs else "not rehearsed"
    speed: float  # seconds of runs that pass in one
    if card:
        speed = floors.REACHED  # whatever runs at once shares the card
        where = f"one {card.upper()} at {floors.REACHED:.0%} of its floor"
    else:
        workers, _ = training_slots(profile.execution, max(stage.runs for stage in stages) or 1)
        speed = workers
        here = machine(Compute.choose(profile.execution.device))
        where = f"{here['device']}, {here['cores']} cores, {workers} runs at once"
    title = f"profile {profile.name} on {where}; {took}"
    table = _table(stages, {stage.paper: Expected.of(stage, costs) for stage in stages}, speed)
    # what seeds have cost so far says nothing of a card
    claims = [] if card else _claims([need for stage in stages for need in stage.open], speed)
    told = (data for data in profile_datasets(params, profile_name) if is_told(data))
    notes = [f"note: {remark}" for data in told for remark in remarks(data)]
    return "\n".join([title, "", *table, "", *_remarks(stages, costs), *notes, *claims]).rstrip()


# ------------------------------------------------------------------------------------------ what is printed


def _claims(found: Sequence[Need], speed: float) -> list[str]:
    """What it takes to decide open claims, by paper, and the sum."""
    if not found:
        return []
    rows = [("open claim", "role", "seeds", "needs", "device time")]
    for need in found:
        seeds = "none" if need.structural else tables.count(need.seeds)
        time = tables.time(need.seconds / speed) if need.seeds else ""
        rows.append((f"{need.paper} {need.claim}", need.role, str(need.have), seeds, time))
    finite = [need for need in found if need.seeds]
    total = (
        f"{tables.time(together(finite) / speed)} for the {len(finite)} of {len(found)} that seeds can decide"
    )
    why = [f"{need.paper} {need.claim}: {need.why}" for need in found if not need.seeds]
    text = "seeds that would decide them with power 0.8, at the level that each faces, if the rest are like these:"
    return ["", text, *tables.aligned(rows), "", f"all together: {total}", *why]


def _table(stages: Sequence[Stage], found: Mapping[str, Expected | None], speed: float) -> list[str]:
    rows = []
    for stage in stages:
        own = found[stage.paper]
        runs = stage.runs or None
        done = None if stage.done is None else len(stage.done)
        costs = (own.epochs, own.seconds / speed, own.left / speed, own.disk) if own else (None,) * 4
        rows.append((runs, done, *costs))
    names = [*(stage.paper for stage in stages), "total"]
    # what is unknown is missing from the total
    totals = [sum(value for value in column if value is not None) for column in zip(*rows)]
    more = ["more than " * (None in column) for column in zip(*rows)]
    shown = [[show(value) for show, value in zip(_SHOWN, row)] for row in rows]
    shown.append([sign + show(value) for sign, show, value in zip(more, _SHOWN, totals)])
    return tables.aligned([_COLUMNS, *((name, *row) for name, row in zip(names, shown))])


_COLUMNS = ("stage", "runs", "done", "epochs", "device time", "to go", "disk")
_SHOWN = (tables.count, tables.count, tables.count, tables.time, tables.time, tables.size)


def _remarks(stages: Sequence[Stage], costs: Mapping[str, Cost]) -> list[str]:
    found = []
    for stage in stages:
        if stage.missing:
            found.append(f"{stage.paper}: {stage.missing}")
        if stage.origins:
            found.append(f"{stage.paper}: {stage.origins}")
        if stage.missing or not costs:
            continue
        all_costs = [costs.get(kind.run.settings_hash) for kind in stage.kinds]
        late = sum(cost is None for cost in all_costs)
        failed = [cost.problem for cost in all_costs if cost and cost.problem]
        macs = sum(cost.from_macs for cost in all_costs if cost and not cost.problem)
        of = f"of {len(all_costs)} kinds of runs"
        if macs:
            found.append(
                f"{stage.paper}: {macs} {of} are reckoned in part from MACs, more --seconds would time them"
            )
        if late:
            found.append(f"{stage.paper}: {late} {of} were not reached and count as the mean of the others")
        if failed:
            found.append(
                f"{stage.paper}: {len(failed)} {of} cannot be rehearsed and count as the mean of the others "
                f"({failed[0]})"
            )
    return found
