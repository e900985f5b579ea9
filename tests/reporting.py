"""Made-up papers, judged and ready to be reported, and what tests read of a report."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

from synthetic import SEEDS, Maker, claim

from common.statistics import __main__ as statistics

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (0.8, 0.9, 0.98)
VARIANTS = ("ft", "lrw", "slr", "clr", "llr", "allr", "gmp", "dpf", "lamp")
README = """# Restarts: a made-up paper

## Deviations
- **Scale**: 8x8 digits, see [the paper](https://example.org/abs/1).
- <script>alert(1)</script> stays text.

## Options
- none of this is a deviation
"""
SVG = "{http://www.w3.org/2000/svg}"


def make(folder: Path) -> None:
    """Three papers: one with many variants, failures and gaps; one small; one that nobody ran."""
    restarts = Maker(folder, "restarts")
    restarts.grid(VARIANTS, TARGETS, SEEDS[:5])
    for record in restarts.records:
        if record["variant"] == "dpf" and record["target"] == 0.98 and record["seed"] == 3:
            record |= {"status": "failed", "reason": "the loss is nan in epoch 3", "metrics": {}, "cost": {}}
        if record["variant"] == "gmp" and record["target"] == 0.9:
            record["metrics"]["test_accuracy"] = (
                None if record["seed"] == 1 else float("nan") if record["seed"] == 2 else 0.9
            )
    trial = {"variant": "tuning-slr-2", "seed": 1000, "status": "failed", "reason": "the loss is inf"}
    restarts.records.append(
        {**restarts.records[0], **trial, "failure": "diverged", "metrics": {}, "cost": {}}
    )
    restarts.write()
    restarts.claims(
        [
            claim(
                "H1",
                "slr",
                ["ft", "lrw"],
                role="headline",
                source="the abstract",
                matters=0.005,
                matters_from="half a point is what readers look for",
                paper_value={"value": 2.0, "unit": "points", "source": "abstract of version 1"},
            ),
            claim("H2", "slr", "gmp", test="noninferiority", margin=0.01, note="A remark."),
            claim("H3", "slr", "lamp", test="equivalence", direction=None, margin=0.015),
            claim("H4", "slr", "ft", test="trend", x="logit"),
            claim("H5", "nobody", "ft"),
            claim(
                "H6",
                "slr",
                {"variant": "dense", "target": 0.0},
                metric="cost.theoretical_speedup",
                scale="ratio",
            ),
            claim("H7", "slr", None, test="threshold", value=0.5),
            claim(
                "D1",
                "lamp",
                "slr",
                role="probe",
                deviation="ties broken at random",
                test="difference",
                direction=None,
            ),
            claim("D2", "not-run", "slr", role="probe", deviation="never run"),
            claim("H8", "dpf", ["allr", "llr", "clr"]),
        ],
        README,
        arithmetic=[
            {
                "id": "A1",
                "statement": "Scoring passes over the data once.",
                "variant": "slr",
                "metric": "cost.dense_macs",
            }
        ],
    )
    gates = Maker(folder, "gates")
    for architecture in ("vgg", "resnet"):
        gates.grid(("random", "gated"), (0.5,), SEEDS[:3], architecture=architecture)
    gates.write(environment=False)
    gates.claims([claim("G1", "gated", "random")])
    Maker(folder, "unrun").claims([claim("U1", "this", "that")], "# Unrun\n")
    judge(folder)


def judge(folder: Path) -> None:
    arguments = ["--records", str(folder / "results" / "digits"), "--claims", str(folder / "replications")]
    assert statistics.main([*arguments, "--out", str(folder / "verdicts.json")]) == 0


def arguments(folder: Path, profile: str = "digits") -> list[str]:
    found = ["--profile", profile, "--results", str(folder / "results" / "digits")]
    found += ["--replications", str(folder / "replications"), "--verdicts", str(folder / "verdicts.json")]
    return [*found, "--out", str(folder / "report")]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def marks(path: Path, name: str) -> list[tuple[float, float]]:
    """Positions of the markers of one named group of an SVG file."""
    for group in ET.parse(path).getroot().iter(f"{SVG}g"):
        if group.get("id") == name:
            return [(float(use.get("x")), float(use.get("y"))) for use in group.iter(f"{SVG}use")]
    return []


class Structure(HTMLParser):
    """Collects addresses, ids and fragments; asserts that elements are closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []
        self.count = 0
        self.unfolded = ""

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self._note(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Collect what is seen before anything is unfolded."""
        if self.open.count("details") <= ("summary" in self.open):
            self.unfolded += data

    def _note(self, attrs):
        self.count += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
                self.addresses.append(value)
            if name in ("style", "clip-path"):
                self.addresses += re.findall(r"url\((.*?)\)", value)


def small_project(folder: Path) -> Path:
    """One paper with one claim that is no headline; returns the folder."""
    paper = Maker(folder, "gates")
    paper.grid(("random", "gated"), (0.5,), SEEDS[:3])
    paper.write()
    paper.claims([claim("G1", "gated", "random")])
    judge(folder)
    return folder
