"""Convolutions of few channels: every kernel against torch, in Triton's interpreter; nothing here needs a GPU."""

import json
import os
import subprocess
import sys

import pytest
from project import ROOT

# the benchmark is no part of the installed packages
sys.path.insert(0, str(ROOT))

from benchmarks.convolutions.estimate import estimates

pytestmark = pytest.mark.slow


def interpreted(*arguments):
    pytest.importorskip("triton", reason="Triton is not installed: there is none for this system")
    script = ROOT / "tests" / "interpreted_convolutions.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_every_kernel_gives_what_torch_gives():
    errors = json.loads(interpreted("errors"))
    assert {"16->16 s1 @8 forward sums, apart: table", "16->32 s2 @8 dgrad plain"} < set(errors)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.long
def test_a_measurement_runs_to_its_end_and_leaves_every_case(tmp_path):
    file = tmp_path / "found.json"
    interpreted("course", file)
    found = json.loads(file.read_text())
    assert found["errors"] == []
    rows = {(row["case"], row["kind"], row["by"], row.get("fused")) for row in found["cases"]}
    shape, first = "16->16 s1 @4", "4->16 s1 @4"
    for kind in ("forward", "dgrad", "wgrad"):
        assert {(shape, kind, "cudnn", None), (shape, kind, "triton", "plain")} < rows
    sums = {f"sums, {finish}" for finish in ("unfolded", "folded", "apart")}
    assert {(case, "forward", "triton", fused) for case in (shape, first) for fused in sums} < rows
    assert {(shape, "dgrad", "triton", f"behind norm, {words.split()[1]}") for words in sums} < rows
    of_training = (shape, "batch norm, ReLU, forward and backward", "training", None)
    assert {of_training, (shape, "normalise", "triton", None)} < rows
    assert all(row["error"] < 1e-5 for row in found["cases"] if "error" in row)


def test_the_estimates_are_sums_of_the_measured_parts():
    measured = json.loads((ROOT / "reports" / "benchmark-gpu" / "convolutions.json").read_text())
    found = estimates(measured["cases"])
    assert found == measured["estimates"]
    # all directions of six such layers, of 19 in all
    alone = sum(
        row["cycled"] for row in measured["cases"] if row["case"] == "16->16 s1 @32" and row["by"] == "cudnn"
    )
    assert 6 * alone < found["ResNet-20, cudnn, cycled"] < 3 * 6 * alone
    without = [row for row in measured["cases"] if row.get("fused") != "norm"]
    left_out = set(found) - set(estimates(without))
    assert left_out and all("norm in a kernel" in name for name in left_out)
