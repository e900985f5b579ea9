"""What MLflow says of a run in words: which claims it is evidence for, with a link to each on the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from common.naming import anchor, slug
from common.records import Identity, Record
from common.statistics.claims import Claim, Selection


def of_run(record: Record, claims: Sequence[Claim], page: Path) -> str:
    """Markdown: the run in a sentence, and the claims that read it.

    page: the report's page of the profile, which need not be there yet.
    """
    place = f"on {record.dataset} ({record.architecture}), target {record.target:g}, seed {record.seed}"
    lines = [f"`{record.variant}` {place}."]
    used = [claim for claim in claims if reads(claim, record)]
    if used:
        lines.append("Evidence for:")
        lines += [
            f"- [{claim.id}]({link(page, record.paper, claim.id)}): {claim.statement}" for claim in used
        ]
    return "\n".join(lines)


def of_experiment(paper: str, claims: Sequence[Claim], page: Path) -> str:
    """Markdown: what the experiment's runs are for, with the paper's headlines."""
    lines = [f"Runs of the stage `{paper}`, judged in [the report]({page.as_uri()}#{slug(paper)})."]
    lines += [
        f"- [{claim.id}]({link(page, paper, claim.id)}): {claim.statement}"
        for claim in claims
        if claim.role == "headline"
    ]
    return "\n".join(lines)


def link(page: Path, paper: str, claim: str) -> str:
    """The address of a claim on the page."""
    return f"{page.as_uri()}#{anchor(paper, claim)}"


def reads(claim: Claim, record: Identity) -> bool:
    """Whether the claim's comparisons can read the run: by variant, cell, target and seed."""
    if record.seed <= claim.seen or not claim.covers(record.dataset, record.architecture):
        return False
    return any(
        _selects(selection, targets, record) for selection, targets in _selections(claim, record.dataset)
    )


def _selections(claim: Claim, dataset: str) -> Iterator[tuple[Selection, tuple[float, ...] | None]]:
    """Each selection, whole, with the targets that it takes where it fixes none (None for all)."""
    targets = claim.targets_for(dataset)
    for treatment, control in claim.pairs():
        treatments = [treatment.model_copy(update=_given(step)) for step in claim.steps or ()] or [treatment]
        for own in treatments:
            yield own, targets
            if control:
                yield own.model_copy(update={**_given(control), "minus": control.minus}), targets
    # what is subtracted is named inside a selection
    for selection in (*claim.treatment, *(claim.control or ())):
        if selection.minus:
            yield selection.model_copy(update={**_given(selection.minus), "minus": None}), targets


def _given(selection: Selection) -> dict[str, object]:
    fields = ("variant", "architecture", "dataset", "target")
    return {name: value for name in fields if (value := getattr(selection, name)) is not None}


def _selects(selection: Selection, targets: tuple[float, ...] | None, record: Identity) -> bool:
    named = ("variant", "architecture", "dataset")
    if any(getattr(selection, name) not in (None, getattr(record, name)) for name in named):
        return False
    if selection.target is not None:
        return selection.target == record.target
    return targets is None or record.target in targets
