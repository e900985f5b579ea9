"""What `dvc.yaml` says of a paper's stage, and what its protocol plans."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.runs import Run, in_order
from common.settings import Profile, read_yaml

PIPELINE_FILE = Path("dvc.yaml")


def producers(stage: str) -> dict[str, str]:
    """The stages whose outputs a stage depends on, by output; none where there is no pipeline."""
    stages: Mapping[str, Any] = read_yaml(PIPELINE_FILE)["stages"] if PIPELINE_FILE.exists() else {}
    made = {
        out if isinstance(out, str) else next(iter(out)): name
        for name, entry in stages.items()
        for out in entry.get("outs", [])
    }
    return {path: made[path] for path in stages.get(stage, {}).get("deps", []) if path in made}


def preparation(stage: str) -> str:
    """The command that makes what a stage depends on."""
    names = dict.fromkeys(producers(stage).values())
    return f"`dvc repro {' '.join(names)}`" if names else "`python -m common.prepare`"


def planned(paper: str, profile: Profile) -> list[Run]:
    """Every run of the paper in the profile, needed ones first. Raises SettingsError, DataError."""
    return in_order(importlib.import_module(f"replications.{paper}.protocol").runs(profile))


def code_folders(paper: str) -> tuple[str, ...]:
    """The folders of `replications` whose code a paper's runs execute; a comparison of papers names several."""
    return tuple(getattr(importlib.import_module(f"replications.{paper}.protocol"), "PAPERS", (paper,)))
