"""`python -m replications.selected STAGE`: a stage of the pipeline that judges or draws, for the profile that params.yaml selects.

So no text of a settings file stands in a command that a shell reads.
"""

from __future__ import annotations

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load

import argparse
import runpy
import sys

from common.profiles import selected_profile
from common.settings import SettingsError


def judging(profile: str) -> list[str]:
    """The module that judges a profile, with its arguments."""
    out = f"reports/{profile}"
    found = ["common.statistics", "--records", f"results/{profile}", "--claims", "replications"]
    return [*found, "--profile", profile, "--out", f"{out}/verdicts.json", "--metrics", f"{out}/metrics.json"]


def drawing(profile: str) -> list[str]:
    """The module that draws the page of a profile, with its arguments."""
    out = f"reports/{profile}"
    found = ["common.report", "--profile", profile, "--results", f"results/{profile}"]
    return [*found, "--replications", "replications", "--verdicts", f"{out}/verdicts.json", "--out", out]


def stages(profile: str) -> dict[str, list[str]]:
    """The commands of the stages, by name."""
    out = f"reports/{profile}"
    whole = f"{out}/whole.html"
    return {
        "statistics": judging(profile),
        "report": [*drawing(profile), "--single-file", whole, "--scales", "reports"],
        "publish": ["common.stage.publish", "--profile", profile, whole, f"{out}/verdicts.json"],
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, if the stage does not end the process itself."""
    parser = argparse.ArgumentParser(prog="python -m replications.selected", description=__doc__)
    parser.add_argument("stage", choices=list(stages("")))
    options = parser.parse_args(arguments)
    try:
        command = stages(selected_profile())[options.stage]
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    module, *sys.argv[1:] = command
    # in this process, which listens to signals already
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    commandline.run(main)
