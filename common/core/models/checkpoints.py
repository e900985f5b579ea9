"""Trained networks that others have saved: read without running anything, and matched to a network's own names."""

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from common.core.models import tensor_files
from common.settings import SettingsError

TORCHVISION = "torchvision:"
_COUNTER = "num_batches_tracked"
_STATES = ("state_dict", "model_state_dict", "model", "net", "network", "model_state", "params")
"""What training scripts call the state of a network, the usual names first."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What wrappers of torch put before every name."""
_AVERAGED = "n_averaged"
"""What torch's wrapper that averages weights puts beside them: of how many."""
_DEEPEST = 4


def read_checkpoint(source: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by name, and a digest of what was read.

    source: a file of torch.save or safetensors (a state dict, or a table with one in it, beside other things), or
    `torchvision:<weights>`, e.g. torchvision:VGG16_BN_Weights.IMAGENET1K_V1, which torchvision downloads
    once. Raises SettingsError naming the source.
    """
    if source.startswith(TORCHVISION):
        return _of_torchvision(source), source
    path = Path(source)
    try:
        if path.exists() and not path.is_file():
            raise SettingsError(f"checkpoint {source}: cannot be read: no ordinary file")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = _content(path)
    except OSError as error:
        raise SettingsError(f"checkpoint {source}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(
            f"checkpoint {source}: not a file of tensors that torch.save wrote: {error}"
        ) from None
    return _without_wrapper(_state(found, source)), digest


def _content(path: Path) -> Any:
    """What the file holds. Raises OSError, ValueError."""
    with path.open("rb") as file:
        begins = file.read(9)
    if begins[8:] == b"{":
        return tensor_files.unpacked(path.read_bytes())[0]
    try:
        if is_zipfile(path):
            _check_archive(path)
        # scripts keep their options beside the state; such a table of options can run nothing
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a damaged file has an unusual number of a format
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # damaged files fail in many ways, and torch's own text advises to run what is in them
        raise ValueError(
            "it is damaged, or holds a network itself or other objects, which are not read since they may run code; save "
            "`model.state_dict()` where it was made"
        ) from None


def _check_archive(path: Path) -> None:
    """Raise where an archive is damaged, or claims more than it holds."""
    with ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != ZIP_STORED for member in members):
            raise ValueError("torch.save compresses nothing")
        if sum(member.file_size for member in members) > path.stat().st_size or archive.testzip():
            raise ValueError("damaged")


def _state(found: Any, source: str) -> dict[str, Tensor]:
    """The one table of tensors in what was read, or the one that has a usual name. Raises SettingsError."""
    tables = _tables(found, _DEEPEST)
    for name in _STATES:
        if len(tables) > 1 and (own := {path: t for path, t in tables.items() if path.split(" ")[0] == name}):
            tables = own
    if len(tables) == 1:
        return next(iter(tables.values()))
    if tables:
        raise SettingsError(
            f"checkpoint {source}: has several tables of tensors: {', '.join(tables)}; keep one of them"
        )
    what = type(found).__name__
    if isinstance(found, Mapping):
        what = f"a table of {', '.join(map(repr, list(found)[:10])) or 'nothing'}"
    raise SettingsError(f"checkpoint {source}: a table of tensors by name is needed, found {what}")


def _tables(found: Any, deepest: int) -> dict[str, dict[str, Tensor]]:
    """The tables of tensors in a value, by the keys that lead to them. Beside one, other entries of a table do not count."""
    if not isinstance(found, Mapping) or not deepest or not all(isinstance(key, str) for key in found):
        return {}
    inner = {
        f"{key} {path}".strip(): table
        for key, value in found.items()
        for path, table in _tables(value, deepest - 1).items()
    }
    own = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    return inner or ({"": own} if own else {})


def _without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {key: value for key, value in state.items() if key != _AVERAGED}
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            return _without_wrapper({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _of_torchvision(source: str) -> dict[str, Tensor]:
    from torchvision.models import get_weight

    name = source.removeprefix(TORCHVISION)
    try:
        weights = get_weight(name)
    except (ValueError, KeyError):
        raise SettingsError(f"checkpoint {source}: torchvision has no weights called {name!r}") from None
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"checkpoint {source}: the download failed ({error}); give a local file instead"
        ) from None


def matched(
    wanted: Mapping[str, Tensor], offered: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are wanted, under their names there, and what is left of those that are offered.

    By name where all names are there (what stands before each of them does not count), else in order, so that names may
    differ. Counters of batches are left out. Raises SettingsError naming the first tensor that does not fit, one whose values
    no network can have, or names that contradict the order or are there for several networks.
    """
    wanted, offered = (
        {k: v for k, v in part.items() if not k.endswith(_COUNTER)} for part in (wanted, offered)
    )
    prefix = _prefix(wanted, offered, source)
    theirs = {key.removeprefix(prefix): value for key, value in offered.items()}
    by_name = set(wanted) <= set(theirs)
    pairs = {name: name for name in wanted} if by_name else dict(zip(wanted, theirs))
    for own, name in pairs.items():
        if wanted[own].shape != theirs[name].shape:
            raise SettingsError(
                f"checkpoint {source} is of another architecture: its {name} is {list(theirs[name].shape)} where "
                f"{own} is {list(wanted[own].shape)}"
            )
    if len(pairs) < len(wanted):
        raise SettingsError(
            f"checkpoint {source} is of another architecture: it has {len(theirs)} tensors, and {len(wanted)} are needed"
        )
    if not by_name:
        _check_order(wanted, theirs, pairs, source)
    for own, name in pairs.items():
        if problem := _unusable(theirs[name], own):
            raise SettingsError(f"checkpoint {source}: its {name} {problem}")
    used = set(pairs.values())
    rest = {name: value for name, value in theirs.items() if name not in used}
    return {own: theirs[name] for own, name in pairs.items()}, rest


def _prefix(wanted: Mapping[str, Tensor], offered: Mapping[str, Tensor], source: str) -> str:
    """What stands before the names that are wanted, where they are all there. Raises SettingsError for more than one."""
    if set(wanted) <= set(offered):
        return ""
    first = f".{next(iter(wanted))}"
    possible = [key.removesuffix(first) + "." for key in offered if key.endswith(first)]
    whole = [prefix for prefix in possible if all(prefix + name in offered for name in wanted)]
    if len(whole) > 1:
        raise SettingsError(
            f"checkpoint {source}: has several networks, under {', '.join(whole)}; keep the tensors of one of them"
        )
    return whole[0] if whole else ""


def _check_order(
    wanted: Mapping[str, Tensor], theirs: Mapping[str, Tensor], pairs: Mapping[str, str], source: str
) -> None:
    """Raise SettingsError where names that fit say that the order is not that of the network."""
    common = [name for name in wanted if name in theirs]
    if all(wanted[name].shape == theirs[name].shape for name in common):
        for name in common:
            if pairs.get(name) != name:
                missing = next(own for own in wanted if own not in theirs)
                raise SettingsError(
                    f"checkpoint {source}: its {name} stands at another place than in the network, and {missing} is not there "
                    "by name; give its tensors the network's names or order"
                )


def _unusable(tensor: Tensor, name: str) -> str | None:
    """What is wrong with a tensor's values."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"is {tensor.dtype} on {tensor.device}, {tensor.layout}: plain tensors of floating-point numbers are needed"
    if not tensor.float().isfinite().all():
        return "has values that are no finite numbers in single precision"
    if name.endswith("running_var") and (tensor < 0).any():
        return "has negative variances"
    return None
