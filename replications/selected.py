"""`python -m replications.selected STAGE`: a stage of the pipeline that judges or draws, for the profile that params.yaml selects.

So no text of a settings file stands in a command that a shell reads.
"""

from __future__ import annotations

import argparse
import os
import sys

from common.settings import SettingsError, selected_profile


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
    """The command line; returns the exit status, if the stage does not take the place of this process."""
    parser = argparse.ArgumentParser(prog="python -m replications.selected", description=__doc__)
    parser.add_argument("stage", choices=list(stages("")))
    options = parser.parse_args(arguments)
    try:
        command = stages(selected_profile())[options.stage]
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    sys.exit(main())
