"""What a page reads of verdicts.json, as `python -m common.statistics` writes it, checked before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.reading import Exact, json_value, read_text
from common.records import LARGEST
from common.settings import SettingsError, validated

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Probability = Annotated[float, Field(ge=0, le=1)]
Verdict = Literal["replicated", "contradicted", "open", "not tested"]
POOLED = ("superiority", "difference", "noninferiority", "equivalence")
"""Tests of a mean paired difference, which cells have in common."""


class _Part(Exact):
    """A part of the document, which may hold more."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class _Side(_Part):
    variant: str | None
    dataset: str | None
    architecture: str | None
    target: Number | None
    minus: _Side | None = None


class _Point(_Part):
    target: Number | None = None
    variant: str | None = None


class _Lost(_Part):
    seed: int
    reason: str


class _OverImages(_Part):
    low: Number | None
    high: Number | None
    holds: bool | None


class _Comparison(_Part):
    label: str
    verdict: Verdict
    graded: str | None
    reason: str
    below_what_matters: bool
    treatment: _Side
    control: _Side | None
    dataset: str | None
    architecture: str | None
    target: Number | None
    points: list[_Point]
    n: Annotated[int, Field(ge=0)]
    seeds: list[int]
    lost: list[_Lost]
    values: list[Number]
    reference: list[Number]
    matters: Number | None
    estimate: Number | None
    low: Number | None
    high: Number | None
    treatment_mean: Number | None
    control_mean: Number | None
    effect_size: Number | None
    detectable: Number | None
    level: Probability | None
    p: Probability | None
    p_against: Probability | None
    p_permutation: Probability | None
    p_wilcoxon: Probability | None
    p_page: Probability | None
    test_name: str | None
    over_images: _OverImages | None = None


class _Stability(_Part):
    tried: int
    held: int
    reversed: list[str]
    first_reversal: str | None
    lost: list[str]
    cannot_tell: list[str] = Field(alias="cannot tell")


class _Claim(_Part):
    id: str
    test: str
    metric: str
    scale: str = "none"
    verdict: Verdict
    reason: str
    below_what_matters: bool = False
    kind: str | None = None
    needs: int | None = None
    p_holm: Probability | None = None
    p_against_holm: Probability | None = None
    stability: _Stability | None = None
    comparisons: Annotated[list[_Comparison], Field(min_length=1)]
    deciding: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.deciding >= len(self.comparisons):
            raise ValueError(
                f"deciding = {self.deciding}: must be one of its {len(self.comparisons)} comparisons"
            )
        for one in self.comparisons if self.test in POOLED else ():
            if one.values and len(one.values) != len(one.seeds):
                raise ValueError(f"comparison {one.label!r}: must have a value of each seed")
            if self.scale == "ratio" and any(value <= 0 for value in one.values):
                raise ValueError(f"comparison {one.label!r}: ratios must be above 0")
        return self


class _Measured(_Part):
    dataset: str
    architecture: str
    target: Number
    low: Number
    high: Number


class _Arithmetic(_Part):
    statement: str
    note: str | None
    scale: str
    values: list[_Measured]


class _Paper(_Part):
    claims: list[_Claim] = []
    arithmetic: list[_Arithmetic] = []
    claims_digest: str | None = None


class _Document(_Part):
    alpha: Probability | None = None
    papers: dict[str, _Paper]


def read(path: Path) -> dict[str, Any]:
    """The content of a verdicts file, whose parts are as they are said to be. Raises SettingsError that names file and key."""
    if not path.exists():
        raise SettingsError(f"{path}: no verdicts there; `python -m common.statistics` writes them")
    return document(path, _Document)


def document(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """The content of a JSON file whose parts are as `kind` has them. Raises SettingsError that names file and key."""
    try:
        found: dict[str, Any] = json_value(read_text(path))
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from None
    validated(kind, found, str(path))
    return found
