"""`python -m benchmarks.gpu [1] [2] [3]`: measure this machine's GPU, step by step.

1 is training right here: tests, the digits protocols twice on the GPU and once on the CPU; 2 how fast it is: the card,
networks alone and several runs at once; 3 stages of a profile, in the order of their headline claims. Each step writes
as it goes on, so one that is stopped leaves what it has: measured.json, summary.md and, of step 3, results.tar.gz, which
`python -m replications import --partial` takes once it is unpacked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import correctness, speed, stages
from benchmarks.gpu.kit import Kit, Step
from common.settings import PARAMS_FILE, SettingsError

STEPS: dict[str, tuple[str, Callable[[Step], None], float]] = {
    "1": ("correctness", correctness.measure, 170),
    "2": ("speed", speed.measure, 300),
    "3": ("stages", stages.measure, 600),
}
"""By number: name, function, and seconds that it may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="1, 2 or 3 (default: all)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of each step (default: 170, 300 and 600)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="with copies of CIFAR, as .npz or in parts"
    )
    parser.add_argument("--papers", nargs="+", default=[], metavar="PAPER", help="only these, in this order")
    parser.add_argument("--profile", default="cifar10", help="of step 3 (default: %(default)s)")
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal, with little of everything")
    options = parser.parse_args(arguments)
    if wrong := [step for step in options.steps if step not in STEPS]:
        parser.error(f"{wrong[0]!r} is no step: {', '.join(STEPS)}")
    kit = Kit(
        options.out.resolve(),
        options.device,
        options.quick,
        options.params.resolve(),
        options.profile,
        tuple(options.papers),
        options.data and options.data.resolve(),
    )
    try:
        for number in options.steps or STEPS:
            name, measure, seconds = STEPS[number]
            step = Step(kit, name, options.budget or seconds)
            print(
                f"{kit.machine['device']}: step {number}, {name}: up to {step.budget:g} seconds", flush=True
            )
            measure(step)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((kit.out / "summary.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
