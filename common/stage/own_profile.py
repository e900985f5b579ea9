"""`python -m replications new-profile`: a profile for data of one's own, which says only what differs from the nearest one."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from common.core import loading
from common.core.files import read_npz
from common.core.loading import NEEDED
from common.core.pictures import sides
from common.profiles import profile_chain
from common.settings import DataError, DatasetSettings, SettingsError
from common.stage.files import write_atomically
from common.stage.folders import listing
from common.stage.papers import load, papers, runs
from common.stage.pipeline import preparation
from common.stage.prepare import described

TINY = range(8, 13)
"""Sides of images for which the networks of the digits are made."""
_PREPARED_AT = {"digits": 8, "cifar10-cpu": 16, "cifar10": 32}
"""To which side the images of a folder are resized, by profile."""
_MOST = {"train": 5000, "validation": 1000, "test": 2000}
"""Images of each split that two CPU cores train on in hours."""
_LEAST = 100
_SCORED = 0.1
"""The share of the training images that those profiles score, in which each class must have one."""
_BATCH = 128
"""Training images are a multiple of it: learning rates drop at whole iterations, and no last batch is tiny."""


@dataclass(frozen=True)
class Own:
    """What there is. test: images of a test split of its own, None without one. side: the shorter one, the least of all."""

    source: str
    path: str
    classes: int
    images: int
    test: int | None
    side: int
    channels: int


def look(path: str) -> Own:
    """What an `.npz` or an image folder holds. Raises DataError."""
    if Path(path).is_dir():
        found, _ = listing(Path(path))
        shorter = min(min(sides(file)) for images in found.values() for file in images.paths)
        train = found.get("train") or found["all"]
        test = len(found["test"].paths) if "test" in found else None
        return Own("folder", path, len(train.classes), len(train.paths), test, shorter, 3)
    arrays = loading.checked(read_npz(path, (*NEEDED, "classes", "scale")), path)
    count, height, width, channels = arrays["x_train"].shape
    classes, test = len(arrays["classes"]), len(arrays["x_test"])
    return Own("npz", path, classes, count, test, min(height, width), channels)


def nearest(own: Own) -> str:
    """The profile whose networks and schedules are made for such images on this machine."""
    if own.side in TINY:
        return "digits"
    return "cifar10" if torch.cuda.is_available() and own.side >= 32 else "cifar10-cpu"


def block(own: Own) -> dict[str, Any]:
    """What the profile says. Raises DataError where there are too few images."""
    base = nearest(own)
    most = dict.fromkeys(_MOST, own.images) if base == "cifar10" else _MOST
    test = min(most["test"], own.images // 5 if own.test is None else own.test)
    left = own.images - (test if own.test is None else 0)
    validation = min(most["validation"], max(own.classes, left // 6))
    train = min(most["train"], left - validation)
    if train < _LEAST:
        raise DataError(f"{own.path}: {train} images would be for training; {_LEAST} are needed at least")
    train -= train % _BATCH if train > _BATCH else 0
    size = min(own.side, _PREPARED_AT[base]) if own.source == "folder" else None
    data: dict[str, Any] = {"source": own.source, "path": own.path, "size": size}
    data |= {"train": train, "validation": validation, "test": test}
    # whether a mirrored picture means the same is for the user to say
    data["augmentation"] = {"crop_padding": 0, "flip": False, "rotation": 0.0}
    found: dict[str, Any] = {"extends": base, "dataset": data}
    if base == "cifar10-cpu" and torch.cuda.is_available():
        found["execution"] = {"device": "auto"}
    if (share := math.ceil(100 * own.classes / train) / 100) > _SCORED:
        found["feature_relevance"] = {"scoring_share": min(share, 1.0)}
    corpus: dict[str, Any] = {"source": "npz", "path": "data/glyphs/corpus.npz", "size": None, "train": None}
    corpus |= {"test": None, "validation": 1000, "augmentation": {"flip": False}}
    if own.channels == 3:
        side = _PREPARED_AT[base] if size is None else size
        corpus |= {"source": "cifar100", "path": None, "size": side, "train": 30000, "test": 1000}
    found["pretraining_impact"] = {"labels": max(train // 3, own.classes), "corpus": corpus}
    return found


def new_profile(name: str, path: str, file: str) -> list[str]:
    """Add a profile for the data at `path` to a file of settings; returns what to say.

    Every paper's runs are listed with it, so it is known to be possible; the images of a folder are prepared for that.
    Raises SettingsError, DataError.
    """
    own = look(path)
    content = block(own)
    known = [each for each, _ in profile_chain(file, content["extends"])]
    text = _inserted(file, name, content, own)
    data = described(DatasetSettings.model_validate(content["dataset"]))
    said = [f"note: {remark}" for remark in data["remarks"]]
    missing = _missing(text, name, file)
    said += [
        f"note: {paper}: {reason}; {preparation(paper)} prepares what it reads" for paper, reason in missing
    ]
    write_atomically(Path(file), text.encode())
    size = f"{own.classes} classes, {content['dataset']['train']} images to train"
    said.append(f"{file}: profile {name} extends {known[-1]}: {size}; change there what you know better")
    prepare = "`python -m common.stage.prepare --profile {0}`, " if missing or own.source == "folder" else ""
    commands = prepare + "`python -m replications plan --profile {0}` says what it costs"
    return [*said, commands.format(name)]


def _missing(text: str, name: str, file: str) -> list[tuple[str, str]]:
    """The papers whose other data is not there yet. Raises SettingsError for a paper whose runs cannot be."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "params.yaml")
        trial.write_text(text, encoding="utf-8")
        for paper in papers():
            try:
                profile = load(paper, trial, name)
                one = profile.paper.model_copy(update={"seeds": profile.paper.seeds[:1]})
                runs(paper, profile.model_copy(update={"paper": one}))
            except DataError as absent:
                found.append((paper, str(absent)))
            except SettingsError as error:
                raise SettingsError(str(error).replace(str(trial), file)) from None
    return found


def _inserted(file: str, name: str, content: dict[str, Any], own: Own) -> str:
    """The text of the file with the profile behind all others. Raises SettingsError."""
    profile_chain(file)  # what is wrong already is told as ever
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", name) or yaml.safe_load(name) != name:
        raise SettingsError(
            f"{name!r}: a name of a profile must be letters, digits, '_', '-' and '.', and begin with a letter; words that some "
            "read as truth values, as `on`, are none"
        )
    text = Path(file).read_text(encoding="utf-8")
    top = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(top, yaml.MappingNode)  # or it would not have been read above
    (profiles,) = (value for key, value in top.value if key.value == "profiles")
    if name in [key.value for key, _ in profiles.value]:
        raise SettingsError(f"{file}: profiles.{name} is there already; give another name")
    if profiles.flow_style:
        raise SettingsError(f"{file}: profiles must be written line by line for another one to be added")
    lines = text.splitlines()
    margin = " " * profiles.value[0][0].start_mark.column
    told = (
        f"{own.path}: {own.images} images with {own.side} pixels on the shorter side, {own.classes} classes"
    )
    added = [f"# {json.dumps(told, ensure_ascii=False)[1:-1]}", f"{name}:"]
    added += [f"  {line}" for line in _dumped(content)]
    place = profiles.end_mark.line if profiles.end_mark.column == 0 else len(lines)
    lines[place:place] = ["", *(margin + line for line in added)]
    return "\n".join(lines) + "\n"


def _dumped(content: dict[str, Any]) -> list[str]:
    """Tables of tables in lines, what they hold in braces."""
    text: str = yaml.safe_dump(
        content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=1000
    )
    return text.splitlines()
