"""`python -m benchmarks.cluster`: what giving runs to a cluster of Ray costs beside this machine's own processes.

The runs do nothing for a millisecond, so what is left is the engine's. The same runs are executed with both engines, one after the
other, again and again; then all are looked up as finished, as a command does that goes on.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.core.run import Cell, Context, Job, Outcome, Run
from common.settings import DatasetSettings, ExecutionSettings, SettingsError
from common.stage.scheduler import execute
from common.stage.store import StageError, Store


class Nothing(Job):
    """Takes a millisecond."""

    @property
    def code(self) -> tuple[str, ...]:
        return ("benchmarks/cluster.py",)

    def execute(self, context: Context) -> Outcome:
        time.sleep(0.001)
        return Outcome({"test_accuracy": 0.5, "test_loss": 1.0}, {})


def _runs(count: int) -> list[Run]:
    cell = Cell(architecture="mlp", data=DatasetSettings())
    return [Nothing(variant="nothing", cell=cell, seed=seed).run for seed in range(count)]


def _seconds(runs: Sequence[Run], settings: ExecutionSettings, folder: Path) -> tuple[float, float]:
    """Until the first run is finished, and from then until all are."""
    ends = [time.perf_counter()]
    store = Store(folder, settings)
    execute(runs, store, settings, settings.engine, lambda entry: ends.append(time.perf_counter()))
    return ends[1] - ends[0], ends[-1] - ends[1]


def _memory() -> float:
    """MB that this process has taken so far, at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--address", default="auto", help="of the cluster (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2000, help="executed (default: %(default)s)")
    parser.add_argument("--finished", type=int, default=10000, help="looked up (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2, help="comparisons (default: %(default)s)")
    options = parser.parse_args(arguments)
    local = ExecutionSettings(device="cpu", precision="float32")
    ray = ExecutionSettings(device="cpu", precision="float32", engine="ray", address=options.address)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for pair in range(options.pairs):
                for settings in (local, ray):
                    place = Path(folder, f"{settings.engine}-{pair}")
                    before = _memory()
                    start, rest = _seconds(_runs(options.runs), settings, place)
                    print(
                        f"{settings.engine}: the first of {options.runs} runs after {start:.1f} s, the others in {rest:.1f} s, "
                        f"{1000 * rest / (options.runs - 1):.1f} ms each; {_memory() - before:.0f} MB more than before",
                        flush=True,
                    )
            store = Store(Path(folder, "finished"), local)
            runs = _runs(options.finished)
            source = Store(Path(folder, "local-0"), local).load(runs[0])
            assert source is not None
            for run in runs:
                record = source.record.model_copy(
                    update={"settings_hash": run.settings_hash, "seed": run.seed}
                )
                store.save(run, source.model_copy(update={"record": record}), None)
            seconds = sum(_seconds(_runs(options.finished), local, store.folder))
            print(f"{options.finished} finished runs are looked up in {seconds:.1f} s")
    except (SettingsError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
