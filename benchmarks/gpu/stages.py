"""Stages of a profile on real data, in the order of their headline claims, as far as the time goes."""

from __future__ import annotations

import io
import statistics
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts
from benchmarks.gpu.correctness import runs
from benchmarks.gpu.jobs import Ended, Job, failed, perform
from benchmarks.gpu.kit import Kit, Step
from common.settings import SettingsError
from common.stage import pipeline
from common.stage.files import write_atomically
from common.stage.papers import load
from common.stage.partial import FOLDER

WORK = Path(".")
"""Where stages are executed: `.runs` and `results` are the project's own, so that a later call goes on."""
TRIES = 2
"""Of a stage that stops on an error: what it has finished is kept."""
LEAST = 5.0
"""Seconds for which a stage is not started any more."""


def measure(step: Step) -> None:
    """Execute one stage after the other, each for all the time that is left, and keep what is finished."""
    kit = step.kit
    found: dict[str, dict[str, Any]] = {}
    logs = kit.out / "stages-logs"
    for old in logs.glob("*.log"):
        old.unlink()

    def execute(name: str, command: list[str], timed: bool = False) -> Ended:
        def whole(seconds: float) -> list[str]:
            return command + ["--time-budget", f"{seconds:.1f}s"] * timed

        def keep() -> None:
            step.keep(
                {"profile": kit.profile, "stages": found | {name: finished(kit, name)} if timed else found}
            )
            pack(kit)

        job = Job(name, whole)
        return perform([job], step.left, slots=1, cwd=WORK, logs=logs, variables=kit.variables, watch=keep)[
            name
        ]

    if kit.data:
        execute("prepare", prepared(kit))
    for paper in kit.papers:
        command = [sys.executable, "-m", "replications", "run", paper]
        command += ["--params", str(kit.params), "--profile", kit.profile]
        seconds, tries = 0.0, 0
        while tries < TRIES and step.left > LEAST:
            ended, tries = execute(paper, command, timed=True), tries + 1
            seconds += ended.seconds
            if ended.status in (0, 3, None):
                break
        if tries:
            about = {"ended": words(ended, paper, logs), "seconds": round(seconds, 1), "tries": tries}
            found[paper] = {**about, **finished(kit, paper)}
            step.keep({"profile": kit.profile, "stages": found})
            pack(kit)


def prepared(kit: Kit) -> list[str]:
    """The command that takes the copies of CIFAR in the folder of the data, which are joined first from their parts."""
    assert kit.data
    for name in {file.name.split(".")[0] for file in kit.data.glob("*.part")}:
        if not (whole := kit.data / f"{name}.npz").exists():
            parts.join(sorted(kit.data.glob(f"{name}.*.part")), whole)
    copies = [word for file in sorted(kit.data.glob("*.npz")) for word in ("--from", str(file))]
    return [
        *[sys.executable, "-m", "common.stage.prepare", "--params", str(kit.params)],
        *["--profile", kit.profile, *copies],
    ]


def finished(kit: Kit, paper: str) -> dict[str, Any]:
    """How many runs of a stage there are, are done and have failed, and by variant the accuracy before pruning."""
    try:
        listed: int | None = len(pipeline.listed(paper, load(paper, kit.params, kit.profile)))
    except SettingsError:
        listed = None  # its data is not there
    records = [record for record, _ in runs(WORK, kit.profile, paper).values()]
    dense: dict[str, list[float]] = {}
    for record in records:
        if record.target == 0 and record.status == "ok" and "test_accuracy" in record.metrics:
            dense.setdefault(f"{record.variant} {record.architecture}", []).append(
                record.metrics["test_accuracy"]
            )
    return {
        "runs": listed,
        "finished": len(records),
        "failed": dict(Counter(record.failure for record in records if record.status == "failed")),
        "dense": {
            name: {"runs": len(values), "mean": round(statistics.fmean(values), 4)}
            for name, values in dense.items()
        },
    }


def words(ended: Ended, paper: str, logs: Path) -> str:
    """How a stage ended, in words."""
    if ended.status is None:
        return "killed: it went on after its time"
    return {0: "complete", 3: "out of time"}.get(ended.status) or failed({paper: ended}, logs)[paper]


def pack(kit: Kit) -> None:
    """Put what the profile's stages have left so far into one file that travels, for `import --partial`."""
    results, buffer = Path("results"), io.BytesIO()
    folders = [results / kit.profile, results / "environment" / kit.profile, results / FOLDER / kit.profile]
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as archive:
        for file in (file for folder in folders for file in sorted((WORK / folder).glob("*"))):
            if file.suffix != ".tmp":  # half written
                archive.add(file, file.relative_to(WORK))
    write_atomically(kit.out / "results.tar.gz", buffer.getvalue())
