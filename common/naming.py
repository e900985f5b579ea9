"""The names by which the report's page and the runs in MLflow find each other."""

from __future__ import annotations

EXPERIMENT = "pruning-replications/{paper}"
"""The MLflow experiment that holds the runs of a paper."""


def slug(text: str) -> str:
    """Lower-case letters, digits and single dashes only, for file names and element names."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def anchor(paper: str, claim: str) -> str:
    """The name of a claim's element on the page."""
    return f"{slug(paper)}-{slug(claim)}"
