"""`python -m common.stage.data`: prepares the data sets of the profile that params.yaml selects, if any is to be prepared.

The stage `data` of the pipeline. Where all data sets are embedded or made by other stages, as in `digits`, the stage
`settings` has written so, and what prepares data, which takes seconds to load, is left alone.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import json
import sys
from pathlib import Path
from typing import Any

from common.profiles import selected_profile
from common.settings import SettingsError
from common.stage.files import write_atomically
from common.stage.outputs import makers

MANIFEST = Path("data/prepared/manifest.json")
"""What was passed over or changed in preparing, and what training had better not see."""


def main() -> int:
    """Prepare what there is to prepare; returns the exit status."""
    try:
        settings, made = Path(".settings", selected_profile(), "data.json"), makers()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    datasets: list[dict[str, Any]] = json.loads(settings.read_text())
    if all(data["source"] == "digits" or data["path"] in made for data in datasets):
        write_atomically(MANIFEST, b"{}\n")
        return 0
    from common.stage import prepare

    return prepare.main([])


if __name__ == "__main__":
    commandline.run(main)
