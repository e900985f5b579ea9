"""`python -m benchmarks.profiles`: what the stages of a profile cost, and how near its networks come to their bare step.

Writes `<profile>.json` into the folder of `--out`. What stages cost is read from their results; where a stage has none,
its networks are measured all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, result, train
from benchmarks.loops import bare
from benchmarks.measuring import Finding
from benchmarks.picture import words
from common.core import loading
from common.core.recipe import Recipe
from common.core.run import Cell
from common.settings import Profile, SettingsError
from common.stage import papers
from common.stage.worker import prepare_process

ROUNDS = 30


@dataclass(frozen=True)
class Trained:
    """A network of a profile, and the batches in which it is trained."""

    cell: Cell
    batch: int

    @property
    def label(self) -> str:
        return f"{self.cell.architecture}, batches of {self.batch}"


def trained(profile: Profile, paper: str) -> list[Trained]:
    """The networks of a paper in its cells, each with every size of batch that a recipe of it has."""
    found = {}
    for run in papers.runs(paper, profile):
        for job in (run.job, *run.job.needs):
            for _, recipe in job.parts(Recipe):
                one = Trained(job.cell, recipe.batch_size)
                found.setdefault(one.label, one)
    return list(found.values())


def share_of_bare_step(profile: Profile, one: Trained, rounds: int = ROUNDS) -> dict[str, Any]:
    """An epoch of the core against as many steps on one fixed batch, as the profile executes it."""
    execution = profile.execution
    bench = Bench(None, execution.device, execution.precision, False, one.batch, execution.compilation)
    data = loading.load(one.cell.data).to(bench.compute.device)
    core, twin = (bench.trainer(bench.compute.place(one.cell.build(data)), data) for _ in range(2))
    steps = len(core.batches)
    measured = bench.measure({"bare step": bare(twin, steps), "core": lambda: train(core)}, rounds)
    shares = measured.ratios("bare step", "core", bench.clock)
    finding = Finding.of(f"{one.label}: core, of its bare step", "share", shares)
    what = f"{one.label}: an epoch of {steps} steps of the core against as many on one fixed batch"
    return result(what, measured, bench.clock, [finding], steps=steps)


def core_seconds(results: Path, profile: str, paper: str) -> dict[str, float] | None:
    """Number of runs of a stage and the seconds that they took together, or None where it has not run."""
    file = results / "environment" / profile / f"{paper}.json"
    if not file.exists():
        return None
    seconds = json.loads(file.read_text())["seconds"].values()
    return {"runs": len(seconds), "core_seconds": round(sum(seconds), 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiles", description=__doc__)
    parser.add_argument("--profile", default="digits", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/benchmark"), help="folder (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    report: dict[str, Any] = {"profile": chosen.profile, "stages": {}, "networks": {}}
    try:
        for paper in papers.papers():
            profile = papers.load(paper, profile=chosen.profile)
            prepare_process(profile.execution)
            if found := core_seconds(chosen.results, chosen.profile, paper):
                report["stages"][paper] = found
                print(f"{paper}: {found['runs']} runs, {found['core_seconds']:,.0f} core-seconds", flush=True)
            for one in trained(profile, paper):
                if one.label not in report["networks"]:
                    report["networks"][one.label] = found = share_of_bare_step(profile, one)
                    print(f"  {found['findings'][0]['label']}: {words(found['findings'][0])}", flush=True)
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / f"{chosen.profile}.json").write_text(json.dumps(report, indent=1) + "\n")
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
