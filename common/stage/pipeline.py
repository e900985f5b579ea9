"""What `dvc.yaml` says of a paper's stage, and the runs that its protocol lists."""

from __future__ import annotations

from common.core.run import Run
from common.settings import Profile
from common.stage.outputs import makers, stages
from common.stage.papers import runs
from common.stage.scheduler import in_order


def producers(stage: str) -> dict[str, str]:
    """The stages whose outputs a stage depends on, by output; none where there is no pipeline."""
    made = makers()
    return {path: made[path] for path in stages().get(stage, {}).get("deps", []) if path in made}


def preparation(stage: str) -> str:
    """The command that makes what a stage depends on."""
    names = dict.fromkeys(producers(stage).values())
    return f"`dvc repro {' '.join(names)}`" if names else "`python -m common.stage.prepare`"


def listed(paper: str, profile: Profile) -> list[Run]:
    """Every run of the paper in the profile, needed ones first. Raises SettingsError, DataError."""
    return in_order(runs(paper, profile))
