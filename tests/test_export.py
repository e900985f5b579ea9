"""`python -m replications export`, the networks that a profile keeps, and where what they take is shown."""

import pytest
import torch
from made_up import record

from common.core import networks
from common.core.models import tensor_files
from common.core.pruning import channels
from common.core.run import Run
from common.report import tables
from common.report.evidence import Paper
from common.settings import SettingsError
from common.stage import headlines
from common.stage.papers import load, runs
from replications.__main__ import main
from replications.exporting import _the_one

PARAMS = """
profile: tiny
profiles:
  tiny:
    dataset: {source: digits, train: 60, validation: 30, test: 100}
    execution: {device: cpu, precision: float32, workers: 1}
    seeds: {first: 10000, count: 2}
    halo: {training: {epochs: 2, milestones: []}, fine_tuning_epochs: 1, targets: [0.5],
           variants: {none: all, magnitude-one-shot: all}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_is_exported_for_other_tools_and_values_alone(folder, capsys):
    command = ["export", "halo", "--variant", "none", "--target", "0.5", "--seed", "10001", "--out"]
    assert main([*command, "net.safetensors"]) == 0
    assert (
        "net.safetensors: halo/none digits_cnn target 0.5 seed 10001, 24,058 parameters"
        in capsys.readouterr().out
    )
    tensors, _ = tensor_files.unpacked((folder / "net.safetensors").read_bytes())
    assert float((tensors["features.0.weight"] == 0).float().mean()) > 0
    # the second time it is only read
    before = {file.name: file.stat().st_mtime_ns for file in (folder / ".runs/tiny/halo").iterdir()}
    assert main([*command, "net.pt2"]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in (folder / ".runs/tiny/halo").iterdir()} == before
    program = torch.export.load(folder / "net.pt2").module()
    assert program(torch.rand(7, 1, 8, 8)).shape == (7, 10)
    kept = (file.read_bytes() for file in (folder / ".runs/tiny/halo").glob("*.safetensors"))
    (content,) = (content for content in kept if b'"target":"0.5"' in content)
    model, about = networks.unpacked(content)
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(program(images), model(images), rtol=1e-6, atol=1e-6)
    assert about["seed"] == 10001 and about["paper"] == "halo"


def test_what_cannot_be_exported_is_named(folder, capsys, monkeypatch):
    assert main(["export", "halo", "--out", "net.pt"]) == 2
    assert "net.pt: must end in .safetensors, .pt2, .onnx" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        main(["export", "halo", "--variant", "none", "--target", "0.5", "--seed", "10001", "--out", "n.onnx"])
        == 2
    )
    assert "n.onnx: onnx is not installed here: `pip install onnx onnxscript`" in capsys.readouterr().err
    assert not (folder / ".runs").exists()
    listed = runs("halo", load("halo"))
    with pytest.raises(
        SettingsError, match=r"2 runs have variant none, target 0.5, where one is needed; of 2: halo/none"
    ):
        _the_one(listed, {"variant": "none", "target": 0.5})
    with pytest.raises(SettingsError, match="0 runs have seed 7, where one is needed; of "):
        _the_one(listed, {"seed": 7})


def test_headline_runs_are_kept_where_the_profile_says_so_and_their_first_seed_is_measured(folder):
    profile = load("halo")
    listed = runs("halo", profile)
    found = headlines.networks("halo", profile, listed)
    by_hash: dict[str, Run] = {run.settings_hash: run for run in listed}
    assert not found.kept and found.measured
    assert {by_hash[name].seed for name in found.measured} == {10000}
    (folder / "params.yaml").write_text(PARAMS.replace("    seeds:", "    keep: headline\n    seeds:"))
    kept = headlines.networks("halo", load("halo"), listed)
    assert kept.measured == found.measured and found.measured < kept.kept
    (folder / "params.yaml").write_text(PARAMS.replace("    seeds:", "    keep: all\n    seeds:"))
    with pytest.raises(SettingsError, match=r"profiles.tiny.keep = 'all': must be one of none, headline"):
        load("halo")


def test_channels_that_nothing_reads_can_go():
    from test_channels import DIGITS, draw, full_widths, trained

    for name, options in (("vgg_t8", {"head": "flatten"}), ("resnet14", {"stem": 8}), ("mobilenet_t8", {})):
        model, *_, images = trained(name, DIGITS, options, steps=1)
        keep = draw(model, seed=3)
        with torch.no_grad():
            for parameter, mask in channels.masks(model, keep).items():
                model.get_parameter(parameter).mul_(mask)
        wanted = model.eval()(images)
        channels.remove(model, channels.read(model))
        assert full_widths(model) == [len(kept) for kept in keep.values()]
        torch.testing.assert_close(model.eval()(images), wanted)


TAKES = {"milliseconds": 0.2, "dense_milliseconds": 0.5, "bytes": 4000, "compressed_bytes": 900}


def test_the_page_shows_what_networks_take_beside_their_costs():
    records = [record("new", 1, 0.9, settings_hash="x"), record("old", 1, 0.9, settings_hash="y")]
    paper = Paper("demo", "Demo", records=records, environment={"measured": {"x": TAKES}})
    (table,) = tables.accuracies(paper)
    assert table["measured"] and table["costs"][0]["values"][-3:] == ["0.2 ms, 2.50×", "4,000", "900"]
    assert table["costs"][1]["values"][-3:] == ["–"] * 3
    (without,) = tables.accuracies(Paper("demo", "Demo", records=records))
    assert not without["measured"] and len(without["costs"][0]["values"]) == 5
