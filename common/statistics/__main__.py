"""`python -m common.statistics`: judges records by claims.

Reads what the runs left and what the papers claim, and writes the verdicts; nothing is trained.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common.profiles import profile_looks
from common.settings import PARAMS_FILE, SettingsError
from common.statistics import claims, records
from common.statistics.verdicts import judge, metrics


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.statistics", description=__doc__)
    for name, what in (
        ("--records", "record files, or folders of them"),
        ("--claims", "claims files, or folders that hold claims.yaml or */claims.yaml"),
    ):
        parser.add_argument(name, help=what, type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--out", help="verdicts to write", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--metrics", help="short metrics to write for `dvc metrics show`", type=Path, metavar="FILE"
    )
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument(
        "--looks",
        help="planned numbers of seeds at which is judged, such as 8,16,32,64 (default: one look at all seeds)",
        type=_looks,
        metavar="N,N,...",
    )
    looks.add_argument("--profile", help=f"judge at the looks that this profile of {PARAMS_FILE} plans")
    options = parser.parse_args(arguments)
    try:
        planned = profile_looks(PARAMS_FILE, options.profile) if options.profile else options.looks
        files = claims.read_all(options.claims)
        found = records.read_all(options.records)
        for paper in sorted(found.keys() - {file.paper for file in files}):
            print(f"note: no claims for paper {paper!r}: its records are ignored", file=sys.stderr)
        verdicts = judge(files, found, planned, checks=True)
        _write(options.out, verdicts)
        if options.metrics:
            _write(options.metrics, metrics(verdicts))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {commandline.told(error)}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts["counts"].items()))
    return 0


def _looks(text: str) -> tuple[int, ...]:
    """`8,16,32` as numbers. Raises argparse.ArgumentTypeError."""
    try:
        looks = tuple(int(part) for part in text.split(","))
    except ValueError:
        looks = ()
    if not looks or looks[0] < 1 or list(looks) != sorted(set(looks)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of ascending numbers of seeds, such as 8,16,32"
        )
    return looks


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with commandline.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    commandline.run(main)
