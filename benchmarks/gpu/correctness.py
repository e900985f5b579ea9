"""Is training right here? Tests, the same bytes twice, and accuracies equal to those of a CPU."""

from __future__ import annotations

import os
import re
import statistics
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from scipy import stats

from benchmarks.gpu.jobs import Job, failed, perform
from benchmarks.gpu.kit import Kit, Step
from common.core.identity import canonical
from common.profiles import profile_blocks, profile_chain
from common.records import Curves, Record, curves_file, read
from common.settings import ROOT
from common.stage.papers import load
from common.stage.partial import partial_file
from common.stage.partial import read as read_partial
from common.stage.store import StageError

PAPER, VARIANTS = "halo", ["none", "halo"]
"""Whose networks are compared with a CPU's over many seeds: small, dense and with a penalty."""
SEEDS, MARGIN = 48, 0.01
"""How many, and the difference of mean accuracies that does not matter."""
TWICE = ("twice-1", "twice-2")
PRECISIONS = ("float32", "bfloat16")
TESTS, GLYPHS, AHEAD = "tests", "glyphs", "ahead"
NETWORKS = ("resnet20", "vgg16")
"""Whose fused layers are compiled ahead: the tests' and those of the second step."""
TESTERS = min(6, os.cpu_count() or 1)
"""Processes that share the tests, where pytest-xdist is there."""
CORPUS = Path("data/glyphs/corpus.npz")

Found = dict[str, tuple[Record, str]]
"""Runs by the digest of their settings: record, and the text of all that a run leaves."""


def measure(step: Step) -> None:
    """Execute all jobs in a folder of their own and keep what they come to, as they go on."""
    with TemporaryDirectory() as folder:
        work, logs = Path(folder), step.kit.out / "correctness-logs"
        for old in logs.glob("*.log"):
            old.unlink()
        slots = max(2, (os.cpu_count() or 1) * 3 // 4)
        (work / "params.yaml").write_text(yaml.safe_dump(derived(step.kit, slots), sort_keys=False))
        ended = perform(
            jobs(step.kit, work),
            step.left,
            slots=slots,
            cwd=work,
            logs=logs,
            variables=step.kit.variables,
            watch=lambda: step.keep(judged(step.kit, work, logs)),
        )
        found, stopped = judged(step.kit, work, logs), failed(ended, logs)
        if found["tests"]["failed"]:
            stopped.pop(TESTS, None)  # they are named already
        step.keep({**found, "stopped": stopped})


# ---------------------------------------------------------------------------------------------- what is executed


def derived(kit: Kit, slots: int) -> dict[str, Any]:
    """The settings file with profiles that extend `digits`: two seeds of each paper, and many of one."""
    blocks, _ = profile_blocks(kit.params, "digits")
    own = profile_chain(kit.params, "digits")[-1][1]
    here, cores = {"device": kit.device}, os.cpu_count() or 1
    there = {"device": "cpu", "workers": max(1, cores // slots)}
    two = {paper: {"seeds": list(load(paper, kit.params, "digits").paper.seeds[:2])} for paper in kit.papers}
    # one setting a method, so that nothing is tuned
    trials = {name: values[:1] for name, values in own.get(PAPER, {}).get("trials", {}).items()}
    wanted, seeds = (VARIANTS[:1], 2) if kit.quick else (VARIANTS, SEEDS)
    known = load(PAPER, kit.params, "digits").paper.variants
    variants = {name: "all" if name in wanted else None for name in known}
    small = {"variants": variants, "trials": trials, "targets": [0.9]}
    at_once = {"seeds": {"first": 0, "count": seeds, "looks": []}, PAPER: small}
    profiles = {name: {"execution": here, **two} for name in TWICE}
    profiles["cpu"] = {"execution": there, **two}
    for precision in _precisions(kit):
        execution = {**here, "precision": precision}
        profiles[f"seeds-{precision}"] = {"execution": execution, **at_once}
    many = {"workers": max(1, cores // 4), "precision": "float32"}
    profiles["seeds-cpu"] = {"execution": there | many, **at_once}
    extended = {name: {"extends": "digits", **block} for name, block in profiles.items()}
    return {"profile": "digits", "profiles": {**blocks, **extended}}


def _precisions(kit: Kit) -> tuple[str, ...]:
    return PRECISIONS[:1] if kit.quick else PRECISIONS


def jobs(kit: Kit, work: Path) -> list[Job]:
    """The processes, longest first."""

    def stage(paper: str, profile: str, **options: Any) -> Job:
        command = [
            sys.executable,
            "-m",
            "replications",
            "run",
            paper,
            "--params",
            "params.yaml",
            "--profile",
            profile,
        ]
        return Job(f"{paper}.{profile}", lambda s: [*command, "--time-budget", f"{s:.1f}s"], **options)

    tests = [sys.executable, "-m", "pytest", str(ROOT / "tests/gpu"), "-c", str(ROOT / "pyproject.toml")]
    tests += ["--rootdir", str(ROOT), "-vv", "-p", "no:cacheprovider", "--basetemp", str(work / "tests")]
    if find_spec("xdist"):
        tests += ["-n", str(TESTERS)]
    found = [Job(TESTS, lambda s: tests, whole=True)]
    if kit.device == "cuda" and find_spec("triton"):
        ahead = [sys.executable, "-m", "benchmarks.gpu.ahead", *NETWORKS]
        found = [Job(AHEAD, lambda s: ahead, whole=True), replace(found[0], after=AHEAD)]
    found += [stage(PAPER, f"seeds-{which}", whole=True) for which in (*_precisions(kit), "cpu")]
    drawn = [paper for paper in kit.papers if str(CORPUS) in canonical(load(paper, kit.params, "digits"))]
    if drawn:
        draw = [sys.executable, "-m", "replications.pretraining_impact.glyphs", "--out", str(CORPUS)]
        found.insert(0, Job(GLYPHS, lambda s: draw, whole=True))
    for paper in kit.papers:
        after = GLYPHS if paper in drawn else None
        found += [stage(paper, profile, after=after) for profile in (*TWICE, "cpu")]
    return found


# ---------------------------------------------------------------------------------------------- what it comes to


def judged(kit: Kit, work: Path, logs: Path) -> dict[str, Any]:
    """What the jobs have shown so far."""
    found = {(name, paper): runs(work, name, paper) for name in (*TWICE, "cpu") for paper in kit.papers}
    seeds = {name: runs(work, f"seeds-{name}", PAPER) for name in (*_precisions(kit), "cpu")}
    return {
        "tests": outcomes(logs / f"{TESTS}.log"),
        "twice": {paper: twice(*(found[name, paper] for name in TWICE)) for paper in kit.papers},
        "against_cpu": {paper: gaps(found[TWICE[0], paper], found["cpu", paper]) for paper in kit.papers},
        "over_seeds": {name: over_seeds(seeds[name], seeds["cpu"]) for name in _precisions(kit)},
    }


def outcomes(log: Path) -> dict[str, Any]:
    """How many tests passed, failed (by name) and were skipped, from pytest's lines."""
    text = log.read_text(errors="replace") if log.exists() else ""
    ended = re.findall(r"^\S+\.py::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    shared = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) \S+\.py::(.+?) *$", text, re.MULTILINE)
    ended += [(name, how) for how, name in shared]
    names = {how: [name for name, found in ended if found == how] for _, how in ended}
    return {
        "passed": len(names.get("PASSED", [])),
        "failed": names.get("FAILED", []) + names.get("ERROR", []),
        "skipped": len(names.get("SKIPPED", [])),
        "complete": bool(re.search(r"^=*\s?.*\d+ \w+.* in [\d.]+s", text, re.MULTILINE)),
    }


def runs(work: Path, profile: str, paper: str) -> Found:
    """What a stage has finished, also one that was stopped or goes on."""
    complete, partial = (
        work / "results" / profile / f"{paper}.jsonl",
        partial_file(work / "results", profile, paper),
    )
    if complete.exists():
        curves = {line.settings_hash: line.curves for _, line in read(curves_file(complete), Curves)}
        ended = [(record, curves[record.settings_hash]) for _, record in read(complete, Record)]
    else:
        try:
            ended = [(entry.record, entry.curves) for entry in read_partial(partial)[1]]
        except StageError:
            return {}  # it has not begun to write
    return {record.settings_hash: (record, canonical([record.content(), rows])) for record, rows in ended}


def twice(once: Found, again: Found) -> dict[str, Any]:
    """How many runs have been done both times, and how many have left the same bytes."""
    both = once.keys() & again.keys()
    differ = [key for key in sorted(both) if once[key][1] != again[key][1]]
    return {
        "pairs": len(both),
        "same": len(both) - len(differ),
        "differ": [_name(once[key][0]) for key in differ[:5]],
        "failed": sum(record.status == "failed" for record, _ in once.values()),
    }


def gaps(here: Found, there: Found) -> dict[str, Any]:
    """How far accuracies are from a CPU's, run by run, as shares; None where there is none."""
    both = [(here[key][0], there[key][0]) for key in here.keys() & there.keys()]
    found = [
        one.metrics["test_accuracy"] - other.metrics["test_accuracy"]
        for one, other in both
        if one.status == other.status == "ok"
        and {"test_accuracy"} <= one.metrics.keys() & other.metrics.keys()
    ]
    return {
        "pairs": len(found),
        "mean": round(statistics.fmean(found), 5) if found else None,
        "sd": round(statistics.stdev(found), 5) if len(found) > 1 else None,
        "largest": round(max(map(abs, found)), 5) if found else None,
    }


def over_seeds(here: Found, there: Found) -> list[dict[str, Any]]:
    """Each variant's difference of accuracy from a CPU's, before pruning, paired by seed.

    Two one-sided tests of level 5 % find both sides equal if the 90 % interval lies within the margin (Schuirmann 1987).
    """
    differences: dict[str, dict[int, float]] = {}
    for key in here.keys() & there.keys():
        one, other = here[key][0], there[key][0]
        if one.variant in VARIANTS and one.target == 0 and one.status == other.status == "ok":
            difference = one.metrics["test_accuracy"] - other.metrics["test_accuracy"]
            differences.setdefault(one.variant, {})[one.seed] = difference
    found = []
    for variant, by_seed in sorted(differences.items()):
        values = np.array(list(by_seed.values()))
        low, high = _interval(values)
        found.append(
            {
                "variant": variant,
                "seeds": len(values),
                "difference": round(float(values.mean()), 5),
                "interval": [round(low, 5), round(high, 5)],
                "margin": MARGIN,
                "equivalent": len(values) > 1 and -MARGIN < low and high < MARGIN,
            }
        )
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    """90 % interval of the mean by Student's t; the mean alone where nothing varies."""
    mean = float(values.mean())
    if len(values) < 2 or not np.ptp(values):
        return mean, mean
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    return float(low), float(high)


def _name(record: Record) -> str:
    return f"{record.paper}/{record.variant} {record.architecture} {record.target:g} seed {record.seed}"
