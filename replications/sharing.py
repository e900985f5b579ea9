"""Several processes train a paper in a folder that they share, as tasks of an array of jobs do; one collects what they did."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common import commandline
from common.core.compute import Compute
from common.core.run import Run
from common.records import Entry
from common.settings import ExecutionSettings, SettingsError
from common.stage import headlines, looks, pipeline
from common.stage.lease import BEAT, STILL
from common.stage.papers import load, papers
from common.stage.recorded import take_over
from common.stage.records import environment
from common.stage.scheduler import execute
from common.stage.shards import Claims, Shard, agreed, alone, taking_part
from common.stage.store import SCRATCH, StageError, Store, TimeBudget
from common.stage.worker import Networks
from replications.commands import RESULTS, execute_looks, present_look, tell_failures


class NotComplete(StageError):
    """Runs are missing that shards are to train."""

    status, word = commandline.STOPPED, "not complete"


def run_shard(
    paper: str, params: str, profile_name: str | None, ends: float, only: Path | None, shard: Shard
) -> None:
    """Execute the runs of a paper's present look together with other shards, and write no results.

    The look is the first until the results hold all of it, which `collect` writes, and then what open claims wait for, judged
    by these. ends, only: as of `commands.run_paper`. Raises SettingsError, StageError, OutOfTime.
    """
    profile = load(paper, params, profile_name)
    if profile.execution.engine != "local":
        raise SettingsError(
            f"{params}: profiles.{profile.name}.execution.engine = {profile.execution.engine}: must be local for --shard"
        )
    listed = pipeline.listed(paper, profile)
    with taking_part(paper, profile.name, shard, ends) as lease:
        store = Store(SCRATCH / profile.name / paper, profile.execution)
        compute = Compute.choose(profile.execution.device, profile.execution.precision)
        about = environment(listed, compute, store)
        known = take_over(RESULTS, profile.name, paper, listed, store, about)
        if only:
            wanted = looks.with_needs(looks.read_list(only, listed), listed)
        else:
            here, lacking = present_look(paper, profile, listed)
            known |= here  # also what has failed and may be tried again
            wanted = looks.with_needs(lacking, listed)
        known |= {run.settings_hash for run in wanted}
        runs = [run for run in listed if run.settings_hash in known]
        claims = Claims(store, lease, shard, agreed(paper, store, lease, about, runs))
        networks = headlines.networks(paper, profile, listed)
        budget = TimeBudget(ends)
        found = execute(runs, store, profile.execution, paper, budget=budget, wanted=networks, claims=claims)
    tell_failures(paper, [entry.record for entry in found])


def collect(only: Sequence[str], params: str, profile_name: str | None) -> None:
    """Write the records of what shards have finished and log them, as `commands.run_paper` would, and train nothing.

    only: these papers, by default all of which a run is kept here. Raises SettingsError, and StageError when one is not at its
    end.
    """
    profiles = {paper: load(paper, params, profile_name) for paper in only or papers()}
    stopped: dict[str, StageError] = {}
    kept = [paper for paper, profile in profiles.items() if only or (SCRATCH / profile.name / paper).is_dir()]
    for paper in kept:
        profile = profiles[paper]
        try:
            listed = pipeline.listed(paper, profile)
            with alone(paper, profile.name, time.time() + STILL + BEAT) as lease:
                gathered = partial(_gathered, set(profile.paper.seeds[profile.looks[0] :]))
                execute_looks(paper, profile, listed, math.inf, None, lease, gathered)
            print(f"{paper}: all runs that its claims need are in {RESULTS}")
        except StageError as stop:
            print(f"{paper}: {stop.word}: {stop}", file=sys.stderr)
            stopped[paper] = stop
    if not kept:
        raise StageError(f"no run of the profile is kept in {SCRATCH}")
    if stopped:
        worst = min(stopped.values(), key=lambda stop: stop.status)
        raise type(worst)(f"not at their end: {', '.join(stopped)}")


def _gathered(
    later: set[int],
    runs: Sequence[Run],
    store: Store,
    execution: ExecutionSettings,
    title: str,
    finished: Callable[[Entry], object],
    budget: TimeBudget,
    wanted: Networks,
    claims: Claims,
) -> list[Entry]:
    """As `common.stage.scheduler.execute`, of runs that have been executed. later: seeds of further looks. Raises NotComplete."""
    entries = {run.settings_hash: entry for run in runs if (entry := store.load(run))}
    for entry in entries.values():
        finished(entry)
    if missing := [run for run in runs if run.settings_hash not in entries]:
        kinds = Counter(run.variant for run in missing)
        seeds = sorted({run.seed for run in missing})
        many = f"{len(missing)} of {len(runs)} runs are missing"
        if later.issuperset(seeds):
            many = f"its claims are open and wait for {len(missing)} further runs"
        failed = sum(entry.record.status == "failed" for entry in entries.values())
        raise NotComplete(
            f"{many} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}; seeds {seeds[0]} to {seeds[-1]}), "
            f"and {failed} have failed; `python -m replications run {title} --shard I/N` trains them, as the next array"
        )
    return [entries[run.settings_hash] for run in runs]
