"""`python -m common.report`: figures, tables and the page of one profile, from its records, without training.

Writes into the `--out` folder: `index.html`, `figures/*.svg` and `*.png`, and `plots/accuracy.json` for
`dvc plots`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common.report import equal_footing, evidence, figures, gathering, judged, page, panels

WORKERS = 4
"""Most processes that draw; with few figures a process costs more than it saves."""
FIGURES_A_WORKER = 12


def report(
    profile: str, results: Path, replications: Path, verdicts: Path, out: Path, environment: Path
) -> int:
    """Draw everything into `out` and return the number of figures. Raises ReportError, OSError."""
    found = evidence.load(profile, results, replications, verdicts, environment)
    views = {paper.name: judged.views(paper) for paper in found.papers}
    planned: list[tuple[str, panels.Panel]] = [("overview", judged.overview(views))]
    for paper in found.papers:
        planned += [(paper.name, panel) for panel in gathering.paper_panels(paper, found.curves)]
        for claim, parts in judged.panels(paper, full_scale=profile == page.FULL_SCALE).items():
            planned += [(f"{paper.name}/{claim}", panel) for panel in parts]
    footing = f"{evidence.EQUAL_FOOTING}/figures"
    planned += [(footing, panel) for panel in equal_footing.panels(equal_footing.tagged(found.papers))]
    names = [panel.name for _, panel in planned]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise evidence.ReportError(
            f"two figures would be called {twice[0]}: rename a paper, data set, architecture or claim"
        )
    drawn: dict[str, list[figures.Drawn]] = {}
    for (place, _), figure in zip(planned, _draw([panel for _, panel in planned])):
        drawn.setdefault(place, []).append(figure)
    paths = {"results": results, "replications": replications, "verdicts": verdicts, "out": out}
    files = {"index.html": page.render(found, views, drawn, paths).encode()}
    for figure in (figure for group in drawn.values() for figure in group):
        files |= {f"figures/{figure.name}.svg": figure.svg.encode(), f"figures/{figure.name}.png": figure.png}
    files["plots/accuracy.json"] = _rows(found.papers).encode()
    _write(out, files)
    return len(planned)


def _draw(planned: Sequence[panels.Panel]) -> list[figures.Drawn]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(WORKERS, cores, len(planned) // FIGURES_A_WORKER)
    if workers < 2:
        return [figures.draw(panel) for panel in planned]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(figures.draw, planned, chunksize=4))


def _rows(papers: Sequence[evidence.Paper]) -> str:
    """Test accuracy of every finished run as flat rows, for `dvc plots`."""
    rows = [
        record.identity | {"test_accuracy": accuracy}
        for paper in papers
        for record in paper.records
        if record.status == "ok" and (accuracy := gathering.measured(record, "test_accuracy")) is not None
    ]
    return json.dumps(rows, indent=0) + "\n"


def _write(out: Path, files: dict[str, bytes]) -> None:
    """Write the files, and remove figures of an earlier report that this one does not have."""
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path in (out / "figures").iterdir():
        if path.suffix in (".svg", ".png") and f"figures/{path.name}" not in files:
            path.unlink()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.report", description=__doc__)
    parser.add_argument("--profile", required=True, help="name of the profile that the records belong to")
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of <paper>.jsonl and <paper>.curves.jsonl"
    )
    parser.add_argument(
        "--replications", type=Path, required=True, help="folder of the papers' claims and READMEs"
    )
    parser.add_argument(
        "--verdicts", type=Path, required=True, help="what `python -m common.statistics` wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--environment",
        type=Path,
        help="folder of <paper>.json (default: environment/<profile> beside --results)",
    )
    options = parser.parse_args(arguments)
    environment = options.environment or options.results.parent / "environment" / options.profile
    try:
        count = report(
            options.profile, options.results, options.replications, options.verdicts, options.out, environment
        )
    except evidence.ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{options.out / 'index.html'}: {count} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
