"""Checkpoints of others: what is read, how it is matched, and what is refused in one line."""

import argparse
import random
import struct
import zipfile

import pytest
import torch
from torch import nn

from common.core.models import build, tensor_files
from common.core.models.checkpoints import matched, read_checkpoint
from common.settings import SettingsError
from replications.pretraining_impact import transfer


def network(**options):
    return build("vgg_t8", classes=10, image_shape=(3, 8, 8), **options)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}},
        {"model": STATE, "acc": 93.1},
        {"net": STATE, "args": argparse.Namespace(lr=0.1)},
        {"model_state_dict": STATE, "step": torch.tensor(3)},
        {"whatever": {"inner": STATE}},
        {"model": STATE, "model_ema": {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}},
        {"state_dict": {f"module._orig_mod.{name}": value for name, value in STATE.items()}},
        {"n_averaged": torch.tensor(7), **{f"module.{name}": value for name, value in STATE.items()}},
        {**STATE, "epoch": 3},
    ],
    ids=lambda content: " ".join(content),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_save_is_read(tmp_path, content, zipped):
    torch.save(content, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    found, digest = read_checkpoint(str(tmp_path / "net.pt"))
    assert list(found) == list(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)
    assert len(digest) == 64


@pytest.mark.parametrize(
    "content, message",
    [
        ({"one": STATE, "two": STATE}, "has several tables of tensors: one, two"),
        ({"weights": [torch.ones(2)], "epoch": 4}, "is needed, found a table of 'weights', 'epoch'"),
        ({0: torch.ones(2)}, "is needed, found a table of 0"),
        ({}, "is needed, found a table of nothing"),
        (torch.ones(2), "is needed, found Tensor"),
        (nn.Linear(2, 2), "or holds a network itself .* save `model.state_dict\\(\\)` where it was made"),
    ],
)
def test_what_holds_no_table_of_tensors_is_described(tmp_path, content, message):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(SettingsError, match=message) as caught:
        read_checkpoint(str(tmp_path / "net.pt"))
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Nothing_Weights.DEFAULT", "ResNet18_Weights.NOTHING", "nothing"])
def test_weights_that_torchvision_does_not_have_are_named(name):
    with pytest.raises(SettingsError, match=f"torchvision has no weights called '{name}'"):
        read_checkpoint(f"torchvision:{name}")


def test_a_file_that_never_ends_is_not_read():
    with pytest.raises(SettingsError, match="/dev/zero: cannot be read: no ordinary file"):
        read_checkpoint("/dev/zero")


def test_safetensors_are_read_and_written(tmp_path):
    tensors = STATE | {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2),
    }
    content = tensor_files.packed(tensors, {"by": "a test"})
    (tmp_path / "net.safetensors").write_bytes(content)
    found, _ = read_checkpoint(str(tmp_path / "net.safetensors"))
    assert list(found) == list(tensors)
    assert all(
        torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype
        for name in tensors
    )
    assert (
        tensor_files.unpacked(content)[1] == {"by": "a test"}
        and tensor_files.packed(found, {"by": "a test"}) == content
    )
    library = pytest.importorskip("safetensors.torch")
    assert all(torch.equal(value, tensors[name]) for name, value in library.load(content).items())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_end_in_one_line(tmp_path, kind):
    draw, file = random.Random(7), tmp_path / "net.pt"
    if kind == "safetensors":
        file.write_bytes(tensor_files.packed(STATE, {}))
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=kind == "zip")
    whole, refused = file.read_bytes(), 0
    for _ in range(60):
        content = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.choice([1, 1, 20])):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(content)
        try:
            read_checkpoint(str(file))
        except SettingsError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 25


def test_flipped_bits_of_an_archive_are_seen(tmp_path):
    file = tmp_path / "net.pt"
    torch.save({"a.weight": torch.zeros(1000)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(b"\0" * 3000) + 1500] ^= 1
    file.write_bytes(content)
    with pytest.raises(SettingsError, match="it is damaged"):
        read_checkpoint(str(file))


def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path):
    file = tmp_path / "net.pt"
    torch.save(STATE, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(SettingsError, match="it is damaged"):
        read_checkpoint(str(file))
    file.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(SettingsError, match="no safetensors file"):
        read_checkpoint(str(file))


def layers(count=3):
    return {f"layer{number}.weight": torch.full((2, 2), float(number)) for number in range(count)}


def test_names_decide_before_order():
    wanted, rest = matched(layers(), dict(reversed((layers() | {"head": torch.ones(3)}).items())), "x")
    assert {name: int(value[0, 0]) for name, value in wanted.items()} == {
        f"layer{n}.weight": n for n in range(3)
    }
    assert list(wanted) == list(layers()) and list(rest) == ["head"]
    # as Lightning saves them
    prefixed = {f"model.{name}": value for name, value in reversed(layers().items())}
    assert list(matched(layers(), prefixed, "x")[0]) == list(layers())
    # within others of its own, and beside something else
    deeper = {"loss.scale": torch.ones(4)} | {f"task.{name}": value for name, value in prefixed.items()}
    found, rest = matched(layers(), deeper, "x")
    assert [int(value[0, 0]) for value in found.values()] == [0, 1, 2] and list(rest) == ["loss.scale"]


def test_several_networks_in_one_table_are_refused():
    both = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in layers().items()}
    with pytest.raises(SettingsError, match="has several networks, under student., teacher.; keep"):
        matched(layers(), both, "x")


def test_order_decides_where_names_are_others():
    others = {f"conv{n}.weight": value for n, value in enumerate(layers().values())}
    found, _ = matched(layers(), others | {"conv9.num_batches_tracked": torch.tensor(3)}, "x")
    assert [int(value[0, 0]) for value in found.values()] == [0, 1, 2]


def test_names_that_contradict_the_order_are_refused():
    names = ["layer1.weight", "layer0.weight", "other.weight"]
    with pytest.raises(
        SettingsError, match="its layer0.weight stands at another place .* layer2.weight is not there"
    ):
        matched(layers(), dict(zip(names, layers().values())), "x")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"features.1.running_var": torch.full((16,), -1.0)},
            "its features.1.running_var has negative variances",
        ),
        (
            {"features.1.running_mean": torch.full((16,), torch.nan)},
            "running_mean has values that are no finite",
        ),
        (
            {"features.1.running_var": torch.full((16,), torch.inf)},
            "running_var has values that are no finite",
        ),
        (
            {"features.0.weight": torch.zeros(16, 3, 3, 3, dtype=torch.int64)},
            "features.0.weight is torch.int64",
        ),
        (
            {"features.0.weight": torch.full((16, 3, 3, 3), 1e300, dtype=torch.float64)},
            "features.0.weight has values that are no finite numbers in single precision",
        ),
        ({"features.0.weight": torch.zeros(16, 3, 3, 3, dtype=torch.complex64)}, "is torch.complex64"),
        ({"features.0.weight": torch.zeros(16, 3, 3, 3).to_sparse()}, "torch.sparse_coo: plain tensors"),
        ({"features.0.weight": torch.zeros(16, 3, 3, 3, device="meta")}, "on meta"),
        ({"features.20.weight": torch.zeros(64, 64, 3, 3)}, "it also has features.20.weight"),
    ],
)
def test_values_that_no_network_can_have_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        transfer.trunk_from_checkpoint(network(), network(seed=1).state_dict() | change, 10, "x")


def test_a_checkpoint_of_too_few_tensors_is_refused():
    with pytest.raises(SettingsError, match="it has 2 tensors, and 3 are needed"):
        matched(layers(), {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, "x")
