"""`python -m common.stage.resolve`: what each stage reads of params.yaml, with all that the profile inherits.

The stage `settings` of the pipeline. A stage depends on its own file in `.settings/<profile>` where it would depend on
params.yaml, so an edit there (also one of a profile that the selected one extends) re-runs the stages whose settings
it changes, and no other. A stage loads its settings from params.yaml all the same; only
`data` reads its file, for whether there is anything to do.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.core.experiment import CellSettings
from common.core.models import own_code
from common.profiles import profile_chain, profile_looks
from common.settings import (
    PARAMS_FILE,
    AugmentationSettings,
    DatasetSettings,
    PaperSettings,
    SettingsError,
    parts,
)
from common.stage.papers import load, papers, profile_datasets, protocol, written
from common.stage.store import code_files, code_prints

FOLDER = Path(".settings")
# settings whose defaults come from outside a paper's folder
_SHARED: tuple[type[BaseModel], ...] = (PaperSettings, DatasetSettings, AugmentationSettings)


def resolved(file: str = PARAMS_FILE, profile: str | None = None) -> dict[str, Any]:
    """By stage, all in the settings that can change what it writes. Raises SettingsError, for every paper's."""
    name, block = profile_chain(file, profile)[-1]
    stages: dict[str, Any] = {
        "data": [
            data.model_dump(mode="json", exclude={"augmentation"}) for data in profile_datasets(file, profile)
        ],
        "statistics": {"looks": profile_looks(file, profile)},
    }
    defaults = {model.__name__: model().model_dump(mode="json") for model in _SHARED}
    for paper in papers():
        complete = load(paper, file, profile)
        stages[paper] = {
            "profile": name,
            "dataset": complete.dataset.model_dump(mode="json"),
            "execution": complete.execution.numbers,
            # as it is written: the paper's own defaults are code, on which its stage depends
            paper: written(block, paper) or None,
            "defaults": defaults,
        }
        cells = parts(complete.paper, CellSettings)
        if own := {Path(file) for cell in cells for file in own_code(cell.architecture)}:
            stages[paper]["networks"] = code_prints(sorted(own))
        if complete.keep != "none":
            stages[paper]["keep"] = complete.keep
        if more := getattr(protocol(paper), "code", None):
            # of papers that enter a comparison, which its stage need not know by name
            entering = set(code_files(paper, more())) - set(code_files(paper))
            stages[paper]["code"] = code_prints(sorted(entering))
    return stages


def write(file: str = PARAMS_FILE, profile: str | None = None, folder: Path = FOLDER) -> None:
    """Write the files of a profile, and remove those of papers that are gone. Raises SettingsError, OSError."""
    stages = resolved(file, profile)
    target = folder / profile_chain(file, profile)[-1][0]
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for stage, settings in stages.items():
        (target / f"{stage}.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.stage.resolve", description=__doc__)
    parser.add_argument("--params", default=PARAMS_FILE, help="settings file (default: %(default)s)")
    parser.add_argument("--profile", help="profile to use in place of the one that the file selects")
    options = parser.parse_args(arguments)
    try:
        write(options.params, options.profile)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    commandline.run(main)
