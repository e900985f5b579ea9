"""`python -m common.report`: the page of one profile from its records, and of all scales, without training.

Writes into the `--out` folder: `index.html`, `figures/*.svg` with `*.csv` beside each, and `plots/*.json` for `dvc plots`.
Into the folder of `--scales`: `index.html`, and `overview.png` for a README.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

from common import commandline
from common.reading import name_option
from common.report import (
    claim_panels,
    equal_footing,
    evidence,
    figures,
    gathering,
    judged,
    page,
    panels,
    plots,
    scales,
)

WORKERS = 4
"""Most processes that draw; with few figures a process costs more than it saves."""
FIGURES_A_WORKER = 12


def report(found: evidence.Evidence, paths: page.Paths, single_file: Path | None = None) -> int:
    """Draw the page of one profile into `paths.out` and return the number of figures. Raises ReportError, OSError.

    single_file: where to write a second page, which holds all figures and needs no file beside it.
    """
    views = {paper.name: judged.views(paper, found.profile) for paper in found.papers}
    planned = plan(found)
    names = [panel.name for _, panel in planned]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise evidence.ReportError(
            f"two figures would be called {twice[0]}: rename a paper, data set, architecture or claim"
        )
    drawn: dict[str, list[figures.Drawn]] = {}
    for (place, _), figure in zip(planned, _draw([panel for _, panel in planned]), strict=True):
        drawn.setdefault(place, []).append(figure)
    files = {"index.html": page.render(found, views, drawn, paths, single_file=False)}
    for figure in (figure for group in drawn.values() for figure in group):
        files |= {f"figures/{figure.name}.svg": figure.svg, f"figures/{figure.name}.csv": figure.csv}
    files |= {f"plots/{name}.json": text for name, text in plots.files(found.papers, found.curves).items()}
    _write(paths.out, files)
    if single_file:
        single_file.write_text(page.render(found, views, drawn, paths, single_file=True), encoding="utf-8")
    return len(planned)


def plan(found: evidence.Evidence) -> list[tuple[str, panels.Panel]]:
    """All panels of a page with their place: a paper, `<paper>/<claim id>`, or the comparison of all methods."""
    planned: list[tuple[str, panels.Panel]] = []
    for paper in found.papers:
        planned += [(paper.name, panel) for panel in gathering.paper_panels(paper, found.curves)]
        for claim, parts in claim_panels.panels(paper, found.profile == page.FULL_SCALE).items():
            planned += [(f"{paper.name}/{claim}", panel) for panel in parts]
    footing = f"{evidence.EQUAL_FOOTING}/figures"
    return planned + [(footing, panel) for panel in equal_footing.panels(equal_footing.tagged(found.papers))]


def _draw(planned: Sequence[panels.Panel]) -> list[figures.Drawn]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(WORKERS, cores, len(planned) // FIGURES_A_WORKER)
    if workers < 2:
        return [figures.draw(panel) for panel in planned]
    # forked, they need not load anew what takes longer than their share of the drawing
    start = "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"
    gc.freeze()  # else each would look through all that is there, again and again
    with (
        commandline.patience() as asked,
        ProcessPoolExecutor(workers, multiprocessing.get_context(start), commandline.end_with_parent) as pool,
    ):
        with commandline.unheard():
            drawing = [pool.submit(figures.draw, panel) for panel in planned]
        left = set(drawing)
        while left:
            left = wait(left, timeout=commandline.LOOKS_EVERY).not_done
            if number := asked():
                commandline.end_children()
                raise commandline.Stopped(number, "the same command draws all anew")
        return [figure.result() for figure in drawing]


def _write(out: Path, files: dict[str, str]) -> None:
    """Write the files, and remove figures of an earlier report that this one does not have."""
    for name, content in files.items():
        path = out / name
        with commandline.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    for path in (out / "figures").glob("*"):
        if path.suffix in (".svg", ".csv") and f"figures/{path.name}" not in files:
            path.unlink()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.report", description=__doc__)
    parser.add_argument(
        "--profile", required=True, type=name_option, help="name of the profile that the records belong to"
    )
    for name, what in (
        ("--results", "folder of <paper>.jsonl and <paper>.curves.jsonl"),
        ("--replications", "folder of the papers' claims and READMEs"),
        ("--verdicts", "what `python -m common.statistics` wrote"),
        ("--out", "folder to write into"),
    ):
        parser.add_argument(name, type=Path, required=True, help=what)
    parser.add_argument(
        "--environment",
        type=Path,
        help="folder of <paper>.json (default: environment/<profile> beside --results)",
    )
    parser.add_argument(
        "--scales", type=Path, help="folder of <profile>/verdicts.json, to show all profiles side by side"
    )
    parser.add_argument(
        "--single-file", type=Path, help="also write the page to this file with all figures in it"
    )
    options = parser.parse_args(arguments)
    environment = options.environment or options.results.parent / "environment" / options.profile
    paths = page.Paths(options.results, options.replications, options.verdicts, options.out)
    try:
        found = evidence.load(
            options.profile, options.results, options.replications, options.verdicts, environment
        )
        count = report(found, paths, options.single_file)
        print(f"{options.out / 'index.html'}: {count} figures")
        if options.scales:
            count = scales.write(options.scales, options.replications)
            print(f"{options.scales / 'index.html'}: {count} profiles")
    except evidence.ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {commandline.told(error)}", file=sys.stderr)
        return 2
    return 0
