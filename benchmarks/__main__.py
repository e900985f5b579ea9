"""`python -m benchmarks`: measure, and write benchmark.json and benchmark.png.

Without --data: the prepared CIFAR-10 if `python -m common.stage.prepare` or the pipeline has made it, else random images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.catalogue import BENCHMARKS, environment, perform
from benchmarks.isolation import alone
from benchmarks.picture import draw, words
from common.core.loading import prepared_file
from common.settings import DatasetSettings, SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help=".npz with x_train, y_train, x_test, y_test"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--out", type=Path, default=Path("reports/benchmark"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer, shorter and smaller comparisons")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: %(default)s"
    )
    parser.add_argument(
        "--precision", default="bfloat16", choices=["bfloat16", "float32"], help="of the core"
    )
    chosen = parser.parse_args(arguments)
    names = chosen.only or [name for name, c in BENCHMARKS.items() if c.quick or not chosen.quick]
    options = {
        "data": _data(chosen.data),
        "device": chosen.device,
        "precision": chosen.precision,
        "quick": chosen.quick,
    }
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
        measure_all(names, options, chosen.out)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or chosen.out}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def measure_all(names: Sequence[str], options: dict[str, Any], out: Path) -> None:
    """Measure each comparison in a process of its own; what there is so far is written after each of them."""
    report: dict[str, Any] = {"environment": alone(environment, options, threads=1), "comparisons": {}}
    for name in names:
        begun, load = time.perf_counter(), os.getloadavg()[0]
        threads = BENCHMARKS[name].threads
        found = alone(perform, name, options, threads=threads)
        seconds = round(time.perf_counter() - begun, 1)
        report["comparisons"][name] = {
            "threads": threads,
            "load_average_before": load,
            "took_seconds": seconds,
            **found,
        }
        (out / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name} ({seconds:.0f} s): {found['what']}", flush=True)
        for finding in found["findings"]:
            print(f"  {finding['label']}: {words(finding)}", flush=True)
    draw(report, out / "benchmark.png")
    print(f"benchmark: {out / 'benchmark.json'}, {out / 'benchmark.png'}")


def _data(file: Path | None) -> dict[str, str] | None:
    if file is not None:
        return {"source": "npz", "path": str(file)}
    return {"source": "cifar10"} if prepared_file(DatasetSettings(source="cifar10")).exists() else None


if __name__ == "__main__":
    sys.exit(main())
