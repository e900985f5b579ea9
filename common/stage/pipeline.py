"""What `dvc.yaml` says of a paper's stage, and the runs that its protocol lists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.core.run import Run
from common.settings import Profile, SettingsError, read_yaml
from common.stage.papers import runs
from common.stage.scheduler import in_order

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
    return f"`dvc repro {' '.join(names)}`" if names else "`python -m common.stage.prepare`"


def listed(paper: str, profile: Profile) -> list[Run]:
    """Every run of the paper in the profile, needed ones first. Raises SettingsError, DataError."""
    found = runs(paper, profile)
    try:
        return in_order(found)
    except ValueError as error:
        raise SettingsError(f"{paper}: {error}") from None
