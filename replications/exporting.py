"""`python -m replications export`: the network of one run, for tools that know nothing of this project."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.core import networks
from common.core.models import tensor_files
from common.core.models.plain import plain
from common.core.pruning import channels
from common.core.run import Run
from common.settings import SettingsError
from common.stage import pipeline
from common.stage.files import write_atomically
from common.stage.papers import load
from common.stage.scheduler import execute, in_order
from common.stage.store import SCRATCH, StageError, Store
from common.stage.worker import Networks

ENDINGS = (".safetensors", ".pt2", ".onnx")
_FOR_ONNX = ("onnx", "onnxscript")
_MOST_NAMED = 5


def export(
    paper: str, params: str, profile_name: str | None, wanted: Mapping[str, Any], remove: bool, out: Path
) -> None:
    """Write the network whose accuracy a run reports; the run is done again where its network is not kept.

    wanted: values of the fields that name the run (variant, target, seed, ...), as far as they are given. remove: channels
    that nothing reads. out: by its ending a program of `torch.export` (.pt2), ONNX, or values alone (.safetensors). Raises
    SettingsError, StageError.
    """
    if out.suffix not in ENDINGS:
        raise SettingsError(f"{out}: must end in {', '.join(ENDINGS)}")
    for name in _FOR_ONNX if out.suffix == ".onnx" else ():
        if importlib.util.find_spec(name) is None:  # before a run is done again
            raise StageError(f"{out}: {name} is not installed here: `pip install {' '.join(_FOR_ONNX)}`")
    profile = load(paper, params, profile_name)
    run = _the_one(pipeline.listed(paper, profile), wanted)
    store = Store(SCRATCH / profile.name / paper, profile.execution)
    kept = Networks(frozenset(each.settings_hash for each in in_order([run])))
    entry = execute([run], store, profile.execution, paper, wanted=kept)[-1]
    if entry.record.status == "failed":
        raise StageError(f"{run} failed: {entry.record.reason}")
    if not (content := store.network_file(run).read_bytes()):
        raise StageError(f"{run} reports the accuracy of no network that it has trained")
    model, about = networks.unpacked(content)
    if remove:
        channels.remove(model, channels.read(model))
    found = plain(model)
    _write(found, torch.zeros(2, *about["image_shape"]), out)
    count = sum(parameter.numel() for parameter in found.parameters())
    print(f"{out}: {run}, {count:,} parameters, images of {tuple(about['image_shape'])}")


def _the_one(runs: list[Run], wanted: Mapping[str, Any]) -> Run:
    found = [run for run in runs if all(run.identity[name] == value for name, value in wanted.items())]
    if len(found) == 1:
        return found[0]
    given = ", ".join(f"{name} {value}" for name, value in wanted.items()) or "nothing"
    names = "; ".join(map(str, (found or runs)[:_MOST_NAMED]))
    raise SettingsError(
        f"{len(found)} runs have {given}, where one is needed; of {len(found or runs)}: {names}"
    )


def _write(model: nn.Module, images: torch.Tensor, out: Path) -> None:
    if out.suffix == ".safetensors":
        write_atomically(out, tensor_files.packed(model.state_dict(), {}))
        return
    batch = ({0: torch.export.Dim("images", min=1)},)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=batch), out)
        return
    torch.onnx.export(model, (images,), out, dynamic_shapes=batch, dynamo=True, verbose=False)
