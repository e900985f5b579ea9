"""`python -m common.statistics.calibrate`: how often the engine errs, on made-up papers of known truth.

Every paper is a set of records and a file of claims, and goes through `judge` as a real one does. Where the truth is on
the border of what a claim says (a null), each answer may be given in at most 5 % of papers; where it is well inside,
the claim should be found to hold (power). Table and picture go to reports/calibration.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.statistics.calibration.cells import Cell, cells
from common.statistics.calibration.page import write
from common.statistics.calibration.papers import Papers
from common.statistics.calibration.results import AGAIN, Result
from common.statistics.judging import Terms, judge_claims

PAPERS = 400  # of a cell


def simulate(cell: Cell, papers: int, stream: int = 0) -> Result:
    """Judges so many papers of a cell; another stream has other papers."""
    digest = hashlib.sha256(cell.key.encode()).digest()
    random = np.random.default_rng([stream, *np.frombuffer(digest[:16], np.uint32).tolist()])
    made, terms, result = Papers(cell), Terms(cell.design.looks or ()), Result(cell, papers)
    only = None if cell.family.others == "null" else 1
    for records in made.draw(random, papers):
        # what `judge` decides by, without the documents that it writes
        judged = judge_claims(made.claims, records, terms)[:only]
        result.counts.update({claim.verdict for claim in judged})
        result.inside.update({comparison.graded for comparison in judged[0].comparisons[:only]})
    return result


def settled(cell: Cell, papers: int) -> Result:
    """The cell's result, of its own number of papers or of this one.

    One above its goal is told from chance by more papers, which are new ones.
    """
    papers = cell.papers or papers
    if cell.kind == "power":
        return simulate(cell, AGAIN * papers)
    result = simulate(cell, papers)
    if not result.missed():
        return result
    again = simulate(cell, AGAIN * papers, stream=1)
    again.first = {"papers": papers, "rates": result.rates()}
    return again


def simulate_all(found: Sequence[Cell], papers: int, jobs: int) -> list[Result]:
    """The results of cells, in their order; the same whatever the number of processes."""
    if jobs == 1:
        return [settled(cell, papers) for cell in found]
    # the long ones first, so that no process ends alone
    order = sorted(range(len(found)), key=lambda at: -found[at].size)
    with ProcessPoolExecutor(jobs) as pool:
        ordered = pool.map(settled, [found[at] for at in order], itertools.repeat(papers))
        # shown in a terminal only
        results = list(tqdm(ordered, total=len(found), unit="cell", disable=None))
    return [result for _, result in sorted(zip(order, results), key=lambda pair: pair[0])]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.statistics.calibrate", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/calibration"), metavar="FOLDER")
    parser.add_argument("--papers", type=int, default=PAPERS, help="made up for a cell", metavar="N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes", metavar="N")
    options = parser.parse_args(arguments)

    results = simulate_all(list(cells()), options.papers, options.jobs)
    write(results, options.out)
    missed = [result for result in results if result.missed()]
    for result in missed:
        print(f"missed: {result.cell.key}: {result.rates()}")
    print(f"{len(results)} cells, {len(missed)} miss their goal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
