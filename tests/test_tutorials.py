"""The tutorials do what they say: their code is executed."""

import json
from pathlib import Path

import pytest
from project import ROOT

NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def cells(file):
    """The code of a notebook, cell by cell."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_network_of_ones_own_is_trained_pruned_counted_and_judged(capsys):
    names = {}
    for number, cell in enumerate(cells(ROOT / "tutorials/own_network.ipynb")):
        exec(compile(cell, f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert names["claim"]["verdict"] == "replicated" and "1 replicated" in printed
    assert (
        "pointwise convolution" in printed and "True ['AdaptiveAvgPool2d', 'BatchNorm2d', 'Conv2d'" in printed
    )
    assert all(record["cost"]["sparsity"] == pytest.approx(0.8, abs=1e-3) for record in names["records"])
    assert {record["architecture"] for record in names["records"]} == {"tutorials/networks.py:separable"}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_notebooks_are_kept_without_what_was_printed(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in content["cells"])
