"""What the commands of `python -m replications` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import commandline
from common.core.compute import Compute
from common.core.identity import canonical
from common.core.run import Run
from common.profiles import selected_profile
from common.records import Entry, Record
from common.settings import PARAMS_FILE, DatasetSettings, Profile, SettingsError, parts
from common.stage import headlines, importing, inspection, looks, own_profile, pipeline, plan
from common.stage.files import write_atomically
from common.stage.lease import Lease
from common.stage.papers import load, papers
from common.stage.partial import PartialResults, partial_file
from common.stage.recorded import recorded, take_over
from common.stage.records import environment, results_files
from common.stage.scheduler import execute
from common.stage.shards import Claims, agreed, alone
from common.stage.store import (
    SCRATCH,
    OutOfTime,
    StageError,
    Store,
    TimeBudget,
    TryAgain,
    code_digest,
)
from common.statistics.claims import ClaimsFile
from replications import selected

if TYPE_CHECKING:
    from common.stage.tracking import StageLog

RESULTS = Path("results")


def status(command: Callable[[], None]) -> int:
    """The exit status of a command, with one line on stderr if it is not 0: 2 if the command cannot go on, 3 if its time
    is spent, 4 if runs are to be tried again."""
    try:
        command()
    except StageError as stop:
        print(f"{stop.word}: {stop}", file=sys.stderr)
        return stop.status
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {commandline.told(error)}; finished runs are kept in {SCRATCH}", file=sys.stderr)
        return 2
    return 0


def print_plan(params: str, profile_name: str | None, seconds: float, card: str | None) -> None:
    """Print what a profile costs on this machine, or on a card. Raises SettingsError."""
    print(plan.plan(params, profile_name, seconds, RESULTS, card))


def new_profile(name: str, data: str, params: str) -> None:
    """Add a profile for data of one's own, and print what to do next. Raises SettingsError."""
    print("\n".join(own_profile.new_profile(name, data, params)))


def print_claims(params: str, profile_name: str | None) -> None:
    """Print what each claim will compare in a profile. Raises SettingsError."""
    from common.stage import foreseen  # needs scipy, which training does not

    print(foreseen.table(params, profile_name))


def run_paper(
    paper: str, params: str, profile_name: str | None, ends: float, only: Path | None = None
) -> None:
    """Execute a paper's runs look by look, write their records and log them.

    ends: when to stop if they are not finished, as of `time.time()`. only: a list of the runs to execute in place of
    looks, beside those that are recorded. Another command that does the same here is waited for. Raises SettingsError,
    StageError, OutOfTime.
    """
    profile = load(paper, params, profile_name)
    listed = pipeline.listed(paper, profile)
    for data in dict.fromkeys(parts(profile, DatasetSettings)):
        # of the others it is said when they are prepared
        if data.source == "npz" and inspection.is_told(data):
            for remark in inspection.remarks(data):
                print(f"note: {remark}", file=sys.stderr)
    with alone(paper, profile.name, ends) as lease:
        execute_looks(paper, profile, listed, ends, only, lease)


def execute_looks(
    paper: str,
    profile: Profile,
    listed: Sequence[Run],
    ends: float,
    only: Path | None,
    lease: Lease,
    execute: Callable[..., list[Entry]] = execute,
) -> None:
    """What `run_paper` does once it is the only one to do so; lease: by which it is. execute: as of the scheduler."""
    begun = time.perf_counter()
    claimed = looks.claims_of(paper, profile)
    first = looks.first_look(listed, profile)
    networks = headlines.networks(paper, profile, listed)
    chosen = looks.with_needs(looks.read_list(only, listed), listed) if only else first
    store = Store(SCRATCH / profile.name / paper, profile.execution)
    compute = Compute.choose(profile.execution.device, profile.execution.precision)
    about = environment(listed, compute, store)
    known = take_over(RESULTS, profile.name, paper, listed, store, about)
    so_far = PartialResults(partial_file(RESULTS, profile.name, paper), about)
    entries: dict[str, Entry] = {}
    kept = {
        run.settings_hash: store.network_file(run) for run in listed if run.settings_hash in networks.kept
    }
    with _tracking(paper, profile.name, about) as log, so_far:

        def finished(entry: Entry) -> None:
            if not lease.held:
                other = lease.owner()
                raise StageError(
                    f"this process stood still for long, and {other} has gone on in its place"
                    if other
                    else f"{lease.path.parent} is not the folder any more in which this command began: it was removed, or "
                    "something was mounted there; where it is back, the same command goes on from what it holds"
                )
            before = entries.get(entry.record.settings_hash)
            if (
                before is None or before.record != entry.record
            ):  # it may have been tried again at a further look
                entries[entry.record.settings_hash] = entry
                log.add(entry, kept.get(entry.record.settings_hash))
                so_far.add(entry)

        while chosen:
            # what is recorded stays, also if the claims have come to need less
            known |= {run.settings_hash for run in chosen}
            runs = [run for run in listed if run.settings_hash in known]
            agreed(paper, store, lease, about, runs)
            budget, claims = TimeBudget(ends), Claims(store, lease)
            try:
                found = execute(runs, store, profile.execution, paper, finished, budget, networks, claims)
            except StageError as stop:
                taken = f"`python -m replications import --partial` takes them from {so_far.file}"
                raise type(stop)(f"{stop}; {taken}") from None
            missing = sum(run.settings_hash not in known for run in first)
            now = about | ({"unfinished": missing} if missing else {})
            now |= {"wall_seconds": round(time.perf_counter() - begun, 1)}
            for path, content in results_files(profile.name, paper, found, now).items():
                write_atomically(RESULTS / path, content)
            wanted = [] if only else _next_look(paper, claimed, listed, profile, found)
            chosen = [run for run in looks.with_needs(wanted, listed) if run.settings_hash not in known]
    _report(log, f"`python -m replications run {paper}` logs what is missing without training again")
    tell_failures(paper, [entry.record for entry in found])


def tell_failures(paper: str, records: Sequence[Record]) -> None:
    """Say which runs of a paper have failed. Raises StageError, or TryAgain, where the same command tries some again."""
    for record in records:
        if record.status == "failed" and not record.is_lost_trial:
            print(f"failed: {paper}/{record.variant} seed {record.seed}: {record.reason}", file=sys.stderr)
    if broken := [record for record in records if record.root_failure == "error"]:
        raise StageError(
            f"{len(broken)} of {len(records)} runs of {paper} have failed on an error, as {broken[0].name}: "
            f"{broken[0].reason}; all others are recorded, and the same command tries these again"
        )
    if died := sum(record.root_failure == "died" for record in records):
        raise TryAgain(
            f"{died} of {len(records)} runs of {paper} have failed because a process died (killed, or the machine is "
            "out of memory); the same command tries them again"
        )


def _next_look(
    paper: str, claims: ClaimsFile | None, runs: Sequence[Run], profile: Profile, entries: Sequence[Entry]
) -> list[Run]:
    """The runs that open claims wait for; none, with a word on stderr, where there is no SciPy."""
    try:
        return looks.next_look(claims, runs, profile, [entry.record for entry in entries])
    except ModuleNotFoundError as missing:
        print(
            f"{missing.name} is not installed here, so which claims are open is not known: the first look is done; where "
            f"it is, `python -m replications open {paper} > FILE` lists what `run {paper} --only FILE` does here",
            file=sys.stderr,
        )
        return []


def decide(profile: str, ends: float) -> None:
    """Run all papers of a profile, then judge and draw what is there.

    ends: when training is to stop, as of `time.time()`; of the time that is left, each paper has an equal share of those
    still to come. Raises SettingsError, StageError, OutOfTime.
    """
    stopped: list[str] = []
    again: list[str] = []
    names = papers()
    for number, paper in enumerate(names):
        share = (ends - time.time()) / (len(names) - number)
        try:
            run_paper(paper, PARAMS_FILE, profile, time.time() + share)
        except TryAgain as failed:
            print(f"{paper}: {failed}", file=sys.stderr)
            again.append(paper)
        except OutOfTime as stop:
            print(f"{paper}: {stop}", file=sys.stderr)
            stopped.append(paper)
    for command in (selected.judging(profile), selected.drawing(profile)):
        if commandline.call(sys.executable, "-m", *command):
            raise StageError(f"`python -m {' '.join(command)}` failed")
    if stopped:
        raise OutOfTime(f"not at their end: {', '.join(stopped + again)}; the same command goes on")
    if again:
        raise TryAgain(
            f"runs of {', '.join(again)} have failed because a process died; the same command goes on"
        )


def print_open(paper: str, params: str, profile_name: str | None) -> None:
    """Print the runs that a paper's open claims wait for, or those that its first look lacks, one JSON object a line.

    Judged by what the results hold. Raises SettingsError, StageError.
    """
    profile = load(paper, params, profile_name)
    listed = pipeline.listed(paper, profile)
    _, lacking = present_look(paper, profile, listed)
    for run in lacking:
        print(canonical(run.identity))


def present_look(paper: str, profile: Profile, listed: Sequence[Run]) -> tuple[set[str], list[Run]]:
    """The settings hashes of the runs that the results hold, and the runs that are to be done next: those that the first look
    lacks, or else those that open claims wait for. Raises SettingsError, StageError."""
    here = recorded(RESULTS, profile.name, paper, code_digest(listed))
    records = here.records if here else {}
    lacking = [run for run in looks.first_look(listed, profile) if run.settings_hash not in records]
    if not lacking:
        ours = [records[run.settings_hash] for run in listed if run.settings_hash in records]
        try:
            found = looks.next_look(looks.claims_of(paper, profile), listed, profile, ours)
        except ModuleNotFoundError as missing:
            raise StageError(
                f"{missing.name} is not installed here, and claims are not judged without"
            ) from None
        lacking = [run for run in found if run.settings_hash not in records]
    return set(records), lacking


def import_results(folder: Path, only: Sequence[str], params: str, unfinished: bool) -> None:
    """Take in the records of another machine, log them and have DVC accept those of complete stages.

    unfinished: also of stages that are not complete. A command that trains one of the papers is waited for. Raises
    SettingsError, StageError.
    """
    with ExitStack() as owned:
        profile = selected_profile(params)
        for paper in papers():
            if (not only or paper in only) and any(
                [*folder.glob(f"*/{paper}.*"), *folder.glob(f"*/*/{paper}.*")]
            ):
                owned.enter_context(alone(paper, profile))
        stages = importing.take_in(folder, RESULTS, only, params, unfinished)
    for stage in stages:
        with _tracking(stage.paper, stage.profile, stage.environment) as log:
            for entry in stage.entries:
                log.add(entry)
        _report(log, "the same command logs what is missing")
        listed = f" of {len(stage.entries) + stage.unfinished}" if stage.unfinished else ""
        print(f"{stage.paper}: {len(stage.entries)}{listed} runs imported")
    complete = [stage.paper for stage in stages if not stage.unfinished]
    if complete and (refused := importing.accept(complete)):
        print(refused, file=sys.stderr)
    for stage in stages:
        if stage.unfinished:
            print(
                f"{stage.paper} is not complete, so DVC is not told of it and `dvc repro {stage.paper}` trains: "
                f"{plan.CONTINUES}. `dvc repro --single-item --force settings statistics report` judges what is there",
                file=sys.stderr,
            )


def _report(log: StageLog | _NoTracking, remedy: str) -> None:
    if log.error:
        what = f"{log.missing} runs were not logged to MLflow" if log.missing else "MLflow logging failed"
        reason = str(log.error).partition("\n")[0]
        print(
            f"{what} ({type(log.error).__name__}: {reason}). The records are complete; {remedy}.",
            file=sys.stderr,
        )


class _NoTracking:
    """Stands in where MLflow is not installed."""

    error = None
    missing = 0

    def __enter__(self) -> _NoTracking:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, entry: Entry, network: Path | None = None) -> None:
        pass


def _tracking(paper: str, profile: str, environment: Mapping[str, Any]) -> StageLog | _NoTracking:
    try:
        from common.stage.tracking import StageLog
    except ModuleNotFoundError as missing:
        print(f"{missing.name} is not installed here: nothing is logged to MLflow", file=sys.stderr)
        return _NoTracking()
    return StageLog(paper, profile, environment)
