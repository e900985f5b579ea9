"""`python -m replications run PAPER`: the stage of a paper, from settings to records; what `dvc repro` calls.

Several processes that share a folder do a stage with `--shard`, `collect` writes what they have left, and `status` says how far
all are. Beside these, `decide` does all of a profile, `open` lists what open claims wait for, `plan` says what a profile will cost on
this machine, `claims` what each claim will compare there, `new-profile` makes one for data of your own, `import` takes in the
results of another machine, `export` writes a trained network for other tools, and `doctor` repairs what a kill has left.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import argparse
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from common.settings import PARAMS_FILE, SettingsError
from common.stage import doctor, processes, status

DECIDED = "digits-decided"
"""The profile of the reference results."""


def _time_budget(text: str) -> float:
    """When `90s`, `25m` or `2h` from now will be, as of `time.time()`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 25m or 2h")
    return time.time() + float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _shard(text: str) -> tuple[int, int]:
    """The 3 and 8 of `3/8`."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as 3/8, from 1/8 to 8/8")
    return int(found[1]), int(found[2])


def _begun(paper: str, profile: str | None) -> bool:
    """Whether runs of the paper are kept here, in any profile if None: there may be nothing left to train then, and if
    there is, workers are there some seconds later."""
    return any(Path(".runs").glob(f"{profile or '*'}/{paper}"))


def _of_run(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a run that were given."""
    fields = ("variant", "dataset", "architecture", "target", "seed")
    return {name: value for name in fields if (value := getattr(options, name)) is not None}


def _print_status(options: argparse.Namespace) -> int:
    """Print how far a profile is; returns the exit status."""
    try:
        print(status.table(options.params, options.profile, Path(".runs"), Path("results")))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m replications", description=__doc__)
    known = parser.add_subparsers(dest="command", required=True)
    run = known.add_parser("run", help="execute the runs of one paper")
    run.add_argument("paper")
    run.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    run.add_argument("--profile", help="profile to use in place of the one that the file selects")
    run.add_argument(
        "--time-budget",
        type=_time_budget,
        default=math.inf,
        metavar="TIME",
        help="stop cleanly after 90s, 25m, 2h, ... (exit status 3); the same command goes on, also elsewhere from a copy of .runs; "
        "what is finished can be imported (--partial)",
    )
    run.add_argument(
        "--only",
        type=Path,
        metavar="FILE",
        help="execute the runs that `open` has listed, and no look of one's own",
    )
    run.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="be the Ith of N processes that share this folder, as tasks of an array of jobs do: all execute the runs of one look "
        "and write no results, which `collect` does then",
    )
    gather = known.add_parser(
        "collect", help="write the results of runs that shards have finished, and log them"
    )
    gather.add_argument("paper", nargs="*", help="default: all of which runs are kept here")
    gather.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    gather.add_argument("--profile", help="profile to use in place of the one that the file selects")
    state = known.add_parser(
        "status", help="what is done, who is at work on what, what has failed and why, and how long it takes"
    )
    state.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    state.add_argument("--profile", help="profile to show in place of the one that the file selects")
    wait = known.add_parser("open", help="list the runs that a paper's open claims wait for")
    wait.add_argument("paper")
    wait.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    wait.add_argument("--profile", help="profile to use in place of the one that the file selects")
    decide = known.add_parser(
        "decide",
        help="run all papers look by look until nothing is open or the seeds are spent, judge and draw",
    )
    decide.add_argument("--profile", default=DECIDED, help="profile to use (default: %(default)s)")
    decide.add_argument(
        "--time-budget",
        type=_time_budget,
        default=math.inf,
        metavar="TIME",
        help="stop training after 90s, 25m, 2h, ... and judge what is there (exit status 3); the same command goes on",
    )
    plan = known.add_parser("plan", help="what a profile costs on this machine, and what of it is done")
    plan.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    plan.add_argument("--profile", help="profile to use in place of the one that the file selects")
    plan.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="how long the rehearsal may take; 0 only counts runs (default: %(default)s)",
    )
    plan.add_argument(
        "--card",
        help="reckon for one such GPU (h100, h200), which need not be here, from the least time that it could need",
    )
    new = known.add_parser("new-profile", help="add a profile for data of your own to the settings")
    new.add_argument("name")
    new.add_argument(
        "--data", required=True, metavar="PATH", help="an .npz file, or a folder of class folders"
    )
    new.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    check = known.add_parser(
        "claims", help="what each claim will compare, and the smallest effect that the seeds can show"
    )
    check.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    check.add_argument("--profile", help="profile to use in place of the one that the file selects")
    take = known.add_parser("import", help="take in the results of another machine without training")
    take.add_argument("folder", type=Path, help="a copy of its folder `results`")
    take.add_argument("--paper", action="append", default=[], help="only this one; may be repeated")
    take.add_argument(
        "--partial",
        action="store_true",
        help="also of stages that were stopped: what they had finished, from its folder `partial`",
    )
    take.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    give = known.add_parser(
        "export", help="write the network of one run for other tools, as plain modules of torch"
    )
    give.add_argument("paper")
    give.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    give.add_argument("--profile", help="profile to use in place of the one that the file selects")
    for field, kind in (
        ("variant", str),
        ("dataset", str),
        ("architecture", str),
        ("target", float),
        ("seed", int),
    ):
        give.add_argument(
            f"--{field}", type=kind, help="of the run, as in its record; not needed where one run is left"
        )
    give.add_argument(
        "--remove-channels", action="store_true", help="without the channels that nothing reads"
    )
    give.add_argument(
        "--out", type=Path, required=True, help="file that ends in .pt2 (torch.export), .onnx or .safetensors"
    )
    known.add_parser("doctor", help="repair what a kill has left that stops DVC or MLflow for good")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return doctor.main()
    if options.command == "status":  # which loads no torch, and prints what the file says wrong as others do
        return _print_status(options)
    processes.set_environment()
    if options.command == "decide" or options.command == "run" and not _begun(options.paper, options.profile):
        processes.prepare()
    # this loads torch, as the process that was just started does beside it
    from common.stage.shards import Shard
    from replications import commands, exporting, sharing

    o = options
    command = {
        "run": lambda: (
            commands.run_paper(o.paper, o.params, o.profile, o.time_budget, o.only)
            if o.shard is None
            else sharing.run_shard(o.paper, o.params, o.profile, o.time_budget, o.only, Shard(*o.shard))
        ),
        "collect": lambda: sharing.collect(o.paper, o.params, o.profile),
        "open": lambda: commands.print_open(o.paper, o.params, o.profile),
        "claims": lambda: commands.print_claims(o.params, o.profile),
        "decide": lambda: commands.decide(o.profile, o.time_budget),
        "new-profile": lambda: commands.new_profile(o.name, o.data, o.params),
        "plan": lambda: commands.print_plan(o.params, o.profile, o.seconds, o.card),
        "export": lambda: exporting.export(
            o.paper, o.params, o.profile, _of_run(o), o.remove_channels, o.out
        ),
        "import": lambda: commands.import_results(o.folder, o.paper, o.params, o.partial),
    }
    return commands.status(command[o.command])


if __name__ == "__main__":
    commandline.run(main)
