"""The papers of the project: which there are, their protocols, and their settings in a profile.

Which there are is told without loading torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from common.profiles import profile_chain
from common.reading import NAME_RULE, is_name, shown, words
from common.settings import (
    PARAMS_FILE,
    ROOT,
    DatasetSettings,
    ExecutionSettings,
    Keep,
    Profile,
    SeedSettings,
    SettingsError,
    hint,
    merged,
    parts,
    validated,
)

if TYPE_CHECKING:
    from common.core.run import Run

_OF_PROFILES = ("extends", "dataset", "execution", "seeds", "keep")
"""Keys of a profile that are no papers."""


def papers() -> list[str]:
    """Names of the papers: the folders of `replications/` that hold a protocol.

    Raises SettingsError for a folder whose name cannot be that of a module, or stands for something else in a profile.
    """
    names = sorted(p.parent.name for p in (ROOT / "replications").glob("*/protocol.py"))
    for name in names:
        if not is_name(name) or "." in name or name in _OF_PROFILES:
            raise SettingsError(
                f"replications/{words(name)}: {NAME_RULE}, without '.', and other than {', '.join(_OF_PROFILES)}"
            )
    return names


def protocol(paper: str) -> ModuleType:
    """The module with the paper's `Settings` and `Experiment`."""
    return importlib.import_module(f"replications.{paper}.protocol")


def runs(paper: str, profile: Profile) -> list[Run]:
    """The runs of the paper's experiment; what they need may be left out. Raises SettingsError, DataError."""
    from common.core import experiment

    return experiment.listed(paper, protocol(paper).Experiment, profile)


def load(paper: str, file: str | os.PathLike = PARAMS_FILE, profile: str | None = None) -> Profile:
    """The validated settings of `paper` in `profile` (default: the one that the file selects).

    A paper without an entry in the profile gets its own defaults. Raises SettingsError.
    """
    known = papers()
    if paper not in known:
        raise SettingsError(f"unknown paper {shown(paper)}; {hint(paper, known)}")
    settings = protocol(paper).Settings
    allowed = [*_OF_PROFILES, *known]
    for name, block in profile_chain(file, profile):  # so an error is named where it is written
        where = f"{file}: profiles.{name}"
        for key in block:
            if key not in allowed:
                raise SettingsError(f"{where}.{words(key)}: unknown key; {hint(key, allowed)}")
        seeds = block.get("seeds")
        loaded = Profile(
            name=name,
            seeds=seeds and validated(SeedSettings, seeds, f"{where}.seeds"),
            keep=_keep(block.get("keep", "none"), f"{where}.keep"),
            dataset=validated(DatasetSettings, block.get("dataset") or {}, f"{where}.dataset"),
            execution=validated(ExecutionSettings, block.get("execution") or {}, f"{where}.execution"),
            paper=validated(settings, written(block, paper), f"{where}.{paper}"),
        )
    return loaded


def _keep(value: Any, where: str) -> Keep:
    if value not in get_args(Keep):
        raise SettingsError(f"{where} = {value!r}: must be one of {', '.join(get_args(Keep))}")
    return value


def written(block: Mapping[str, Any], paper: str) -> Any:
    """What a profile, with all that it inherits, says of a paper: its own settings, and the seeds of all papers."""
    own = block.get(paper) or {}
    if "seeds" not in block or not isinstance(own, Mapping):
        return own
    return {**own, "seeds": merged(block["seeds"], own.get("seeds", {}))}


def profile_datasets(
    file: str | os.PathLike = PARAMS_FILE, profile: str | None = None
) -> list[DatasetSettings]:
    """Every data set that a profile's papers read, each once. Raises SettingsError."""
    from common.core.loading import prepared_file

    found: dict[str, DatasetSettings] = {}
    for paper in papers():
        for data in parts(load(paper, file, profile), DatasetSettings):
            found.setdefault(str(prepared_file(data)), data)
    return list(found.values())
