"""The record: what a run leaves in the results, for all that write, read, import and report it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """One run: what determines it and all it measured, except clocks.

    metrics: measured values, None where one is not a finite number. cost: sizes and MACs, as of
    `common.core.pruning.counting.cost`. details: other facts, as JSON values. reason: why a failed run failed.
    """

    model_config = ConfigDict(frozen=True)

    paper: str
    variant: str
    dataset: str
    architecture: str
    target: float
    seed: int
    status: Literal["ok", "failed"]
    reason: str | None = None
    settings: dict[str, Any] = {}
    settings_hash: str = ""
    data: list[str] = []
    metrics: dict[str, Any] = {}
    cost: dict[str, Any] = {}
    details: dict[str, Any] = {}
