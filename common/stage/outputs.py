"""What the stages of the pipeline make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.reading import read_yaml

PIPELINE_FILE = Path("dvc.yaml")


def stages() -> Mapping[str, Any]:
    """What `dvc.yaml` says of each stage; nothing where there is no pipeline."""
    found: Mapping[str, Any] = read_yaml(PIPELINE_FILE)["stages"] if PIPELINE_FILE.exists() else {}
    return found


def makers() -> dict[str, str]:
    """The stage that makes each output."""
    return {
        out if isinstance(out, str) else next(iter(out)): name
        for name, entry in stages().items()
        for out in entry.get("outs", [])
    }
