"""Of which runs the networks are wanted: those that a paper's headline claims compare."""

from __future__ import annotations

from collections.abc import Sequence

from common.core.run import Run
from common.records import Identity
from common.settings import Profile, SettingsError
from common.stage import looks
from common.stage.descriptions import reads
from common.stage.scheduler import in_order
from common.stage.worker import Networks


def networks(paper: str, profile: Profile, runs: Sequence[Run]) -> Networks:
    """The networks of headline runs: kept if the profile says so, and measured with the first seed of each place."""
    compared = _compared(paper, runs)
    first: dict[tuple[object, ...], str] = {}
    for run in sorted(compared, key=lambda run: run.seed):
        first.setdefault((run.variant, run.dataset, run.architecture, run.target), run.settings_hash)
    # a run may report what one that it needs has tested
    kept = in_order(compared) if profile.keep == "headline" else []
    return Networks(frozenset(run.settings_hash for run in kept), frozenset(first.values()))


def _compared(paper: str, runs: Sequence[Run]) -> list[Run]:
    try:
        file = looks.claims_file(paper)
    except SettingsError:  # which the statistics will say
        return []
    claims = [claim for claim in file.claims if claim.role == "headline"] if file else []
    return [run for run in runs if any(reads(claim, Identity(**run.identity)) for claim in claims)]
