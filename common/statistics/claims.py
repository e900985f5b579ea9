"""The schema of `claims.yaml`: what would make a paper's statements true or false.

It is described for authors in replications/CLAIMS.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from common.reading import NAME_RULE, is_name, read_bytes, read_yaml, shown, words
from common.records import LARGEST, Words
from common.settings import SettingsError, Strict, apart, hint, validated
from common.statistics.records import SHARE, unit

CLAIMS_FILE = "claims.yaml"
OTHER = "other"
"""Key of a table by data set that stands for every data set without its own entry."""

Test = Literal[
    "superiority",
    "difference",
    "noninferiority",
    "equivalence",
    "threshold",
    "trend",
    "sign",
    "diversity",
    "count",
]
# the fields that a test needs, and those that it can do without; all others are errors
_FIELDS: dict[Test, tuple[set[str], set[str]]] = {
    "superiority": ({"control", "direction"}, {"margin", "targets", "scale"}),
    "difference": ({"control"}, {"margin", "targets", "scale"}),
    "noninferiority": ({"control", "direction"}, {"margin", "targets", "scale"}),
    "equivalence": ({"control"}, {"margin", "targets", "scale"}),
    "threshold": ({"direction", "value"}, {"control", "targets", "scale"}),
    "trend": ({"direction"}, {"control", "targets", "scale", "x", "steps"}),
    "sign": ({"control", "direction"}, {"targets", "scale"}),
    "diversity": ({"control", "direction"}, {"targets"}),
    "count": ({"direction", "value"}, {"control", "targets", "scale"}),
}
_EVERY_TEST = {
    "id",
    "statement",
    "role",
    "source",
    "seen",
    "deviation",
    "treatment",
    "where",
    "metric",
    "test",
    "matters",
    "matters_from",
    "bounds",
    "require",
    "precondition",
    "meant_to_fail",
    "paper_value",
    "note",
}
_NEEDS_MATTERS = ("noninferiority", "equivalence")

MOST_CLAIMS = 200
"""Of a paper. All of them are judged again on each of some twenty other terms."""
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Target = Annotated[float, Field(ge=0, le=1e9)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, Mapping, BaseModel)) else value


def _by_dataset(value: Any) -> Any:
    return value if isinstance(value, Mapping) else {OTHER: value}


Names = Annotated[tuple[Words, ...], BeforeValidator(_listed), Field(min_length=1)]
Margins = Annotated[
    dict[str, Annotated[float, Field(gt=0, le=LARGEST)]], BeforeValidator(_by_dataset), Field(min_length=1)
]
Effects = Annotated[
    dict[str, Annotated[float, Field(ge=0, le=LARGEST)]], BeforeValidator(_by_dataset), Field(min_length=1)
]
TargetLists = Annotated[
    dict[str, Annotated[tuple[Target, ...], Field(min_length=1, max_length=50), AfterValidator(apart)]],
    BeforeValidator(_by_dataset),
    Field(min_length=1),
]


class Selection(Strict):
    """Which records, and what of them; what is left out is the cell's, or that of the treatment."""

    variant: Words | None = None
    architecture: Words | None = None
    dataset: Words | None = None
    target: Target | None = None
    metric: Words | None = None
    minus: Selection | None = None
    """Another record of the same seed whose metric is subtracted."""


class Step(Selection):
    """One point of a trend."""

    x: Number | None = None
    """Where it lies on the axis; its number, from 1, when absent."""


class Where(Strict):
    """The cells that a claim is about; all that were run, where absent."""

    dataset: Names | None = None
    architecture: Names | None = None


class PaperValue(Strict):
    """A number that the paper itself states, with its source."""

    value: Number
    unit: Text
    source: Text


class Precondition(Strict):
    """A variant that must not be worse than another, on average, for anything to be judged.

    So a control that is broken, or a dense network that has not converged (one trained twice as long is the other), makes
    no verdict. In claims.yaml the keys may have spaces: `{variant: a, not worse than: b, by: 0.02}`.
    """

    variant: Words
    not_worse_than: Words
    by: Annotated[float, Field(ge=0, le=1)] | None = None
    """In units of test accuracy; what matters to the claim, where absent."""

    @model_validator(mode="before")
    @classmethod
    def _with_spaces(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {str(key).replace(" ", "_"): value for key, value in values.items()}


class Claim(Strict):
    """A falsifiable statement of a paper."""

    id: Words
    statement: Text
    role: Literal["headline", "supporting", "probe"] = "supporting"
    """The abstract's, the paper's, or ours: the families of Holm's correction; probes stand alone."""
    source: Text | None = None
    """Where the paper says it."""
    seen: Annotated[int, Field(ge=-1)] = -1
    """The highest seed whose results had been seen when the claim was made: only higher ones judge it."""
    deviation: Text | None = None
    """What of the replication differs from the paper, of a probe that measures how much it moves."""
    treatment: Annotated[tuple[Selection, ...], BeforeValidator(_listed), Field(min_length=1)]
    control: Annotated[tuple[Selection, ...], BeforeValidator(_listed), Field(min_length=1)] | None = None
    where: Where = Where()
    targets: TargetLists | None = None
    metric: Words = "test_accuracy"
    test: Test
    direction: Literal["higher", "lower"] | None = None
    matters: Effects | None = None
    """The smallest effect that matters, in units of the metric, by data set."""
    matters_from: Text | None = None
    """Why it is that effect: the paper's own differences, or a reader's need."""
    margin: Margins | None = None
    """An older word for `matters`, which in test superiority also shifts the null."""
    value: Number | None = None
    bounds: tuple[Number | None, Number | None] | None = None
    """Floor and cap of the metric; at them, values are censored."""
    scale: Literal["points", "ratio", "none"] = "none"
    x: Literal["target", "logit"] = "target"
    steps: Annotated[tuple[Step, ...], Field(min_length=2)] | None = None
    require: Literal["all", "any"] = "all"
    precondition: (
        Annotated[tuple[Precondition, ...], BeforeValidator(_listed), Field(min_length=1)] | None
    ) = None
    meant_to_fail: Names | None = None
    """Variants that are to be at chance, which makes them no unsound arms."""
    paper_value: PaperValue | None = None
    note: Annotated[str, Field(max_length=10_000)] | None = None

    def pairs(self) -> list[tuple[Selection, Selection | None]]:
        """What is compared with what: equal lists in order, a single selection with each of a list."""
        controls = self.control or (None,)
        longest = max(len(self.treatment), len(controls))
        return list(zip(_repeated(self.treatment, longest), _repeated(controls, longest), strict=True))

    def matters_for(self, dataset: str | None) -> float | None:
        """The smallest effect that matters in a data set, None where the claim states none."""
        table = self.matters or self.margin
        return _entry(table, OTHER if dataset is None else dataset)

    def scaled(self, factor: float) -> Claim:
        """The claim with `factor` times as much that matters."""

        def times(table: Mapping[str, float] | None) -> dict[str, float] | None:
            return {name: factor * value for name, value in table.items()} if table else None

        return self.model_copy(update={"matters": times(self.matters), "margin": times(self.margin)})

    def targets_for(self, dataset: str) -> tuple[float, ...] | None:
        """The targets for a data set, None for all that were run."""
        return _entry(self.targets, dataset)

    def covers(self, dataset: str, architecture: str) -> bool:
        """Whether the claim is made for this cell."""
        tables = all(
            table is None or dataset in table or OTHER in table
            for table in (self.matters, self.margin, self.targets)
        )
        names = ((self.where.dataset, dataset), (self.where.architecture, architecture))
        return tables and all(allowed is None or name in allowed for allowed, name in names)


def _repeated(items: tuple, length: int) -> tuple:
    return items * length if len(items) == 1 else items


def _entry(table: Mapping[str, Any] | None, dataset: str) -> Any:
    return None if table is None else table.get(dataset, table.get(OTHER))


class Arithmetic(Strict):
    """A number that settings fix before anything is trained: shown beside the claims, never judged."""

    id: Words
    statement: Text
    variant: Words
    target: Target | None = None
    """All that were run, where absent."""
    metric: Words
    scale: Literal["points", "none"] = "none"
    note: Annotated[str, Field(max_length=10_000)] | None = None


@dataclass(frozen=True)
class ClaimsFile:
    """The claims of one paper."""

    paper: str
    claims: tuple[Claim, ...]
    digest: str
    """SHA-256 of the file's bytes, 64 hexadecimal characters."""
    path: Path
    arithmetic: tuple[Arithmetic, ...] = ()


def read_all(paths: list[Path]) -> list[ClaimsFile]:
    """All claims of files, and of folders that hold `claims.yaml` or `*/claims.yaml`, by the papers' names.

    Raises SettingsError naming file, claim and field; also for two files of one paper, and for a folder
    without any.
    """
    found: dict[str, ClaimsFile] = {}
    for path in _files(paths):
        file = read(path)
        if other := found.get(file.paper):
            raise SettingsError(f"{path}: paper {file.paper!r} has claims in {other.path} already")
        found[file.paper] = file
    return [found[paper] for paper in sorted(found)]


def _files(paths: list[Path]) -> Iterator[Path]:
    seen = set()
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted([*path.glob(CLAIMS_FILE), *path.glob(f"*/{CLAIMS_FILE}")])
            if not inside:
                raise SettingsError(f"{path}: no {CLAIMS_FILE} in this folder or the folders in it")
        for file in inside:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def read(path: Path) -> ClaimsFile:
    """The claims of one file. Raises SettingsError naming file, claim and field."""
    content = read_yaml(path)
    top = ["paper", "seen", "claims", "arithmetic"]
    if not isinstance(content, Mapping):
        raise SettingsError(f"{path}: must be a table with the keys {', '.join(top)}")
    for key in content:
        if key not in top:
            raise SettingsError(f"{path}: {words(key)}: unknown key; {hint(key, top)}")
    paper, entries = content.get("paper"), content.get("claims")
    if not is_name(paper):
        raise SettingsError(f"{path}: paper = {shown(paper)}: must be the paper's name; {NAME_RULE}")
    if not isinstance(entries, list) or not entries:
        raise SettingsError(f"{path}: claims = {shown(entries)}: must be a list of claims")
    if len(entries) > MOST_CLAIMS:
        raise SettingsError(f"{path}: claims: {len(entries)} are given; must be at most {MOST_CLAIMS}")
    seen = content.get("seen", -1)
    if not isinstance(seen, int) or isinstance(seen, bool) or seen < -1:
        raise SettingsError(f"{path}: seen = {shown(seen)}: must be the highest seed that has been seen")
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(entries, start=1):
        claim = _claim(entry, path, number)
        if claim.id in claims:
            raise SettingsError(f"{path}: claim {claim.id}: two claims have this id")
        claims[claim.id] = claim.model_copy(update={"seen": max(seen, claim.seen)})
    arithmetic = content.get("arithmetic") or []
    if not isinstance(arithmetic, list):
        raise SettingsError(f"{path}: arithmetic = {shown(arithmetic)}: must be a list")
    fixed = [validated(Arithmetic, entry, f"{path}: arithmetic[{n}]") for n, entry in enumerate(arithmetic)]
    for number, one in enumerate(fixed):
        if one.id in {*claims, *(other.id for other in fixed[:number])}:
            raise SettingsError(f"{path}: arithmetic {one.id}: another entry has this id")
    digest = hashlib.sha256(read_bytes(path)).hexdigest()
    return ClaimsFile(paper, tuple(claims.values()), digest, path, tuple(fixed))


def _claim(entry: Any, path: Path, number: int) -> Claim:
    name = entry.get("id") if isinstance(entry, Mapping) else None
    where = f"{path}: claim {words(name) if name is not None else f'number {number}'}"
    if isinstance(entry, Mapping):
        # one by one, so that an error in a part names the fields of that part
        entry = dict(entry)
        for key, model in (
            ("treatment", Selection),
            ("control", Selection),
            ("steps", Step),
            ("precondition", Precondition),
            ("paper_value", PaperValue),
        ):
            if entry.get(key) is not None:
                entry[key] = _parts(model, entry[key], f"{where}.{key}")
    claim = validated(Claim, entry, where)
    _check(claim, where)
    return claim


def _parts(model: type[BaseModel], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        return validated(model, value, where)
    return [validated(model, item, f"{where}[{index}]") for index, item in enumerate(value)]


def _check(claim: Claim, where: str) -> None:
    """What one field says about another."""
    needed, allowed = _FIELDS[claim.test]
    given = claim.model_fields_set
    for key in sorted(needed):
        if getattr(claim, key) is None:
            raise SettingsError(f"{where}.{key}: missing; test {claim.test} needs it")
    if claim.role == "headline":
        for key in ("source", "matters_from"):
            if getattr(claim, key) is None and not (key == "matters_from" and claim.test == "count"):
                raise SettingsError(f"{where}.{key}: missing; a headline needs it")
    if claim.deviation and claim.role != "probe":
        raise SettingsError(f"{where}.deviation: only of a probe")
    if claim.matters and claim.margin:
        raise SettingsError(f"{where}.margin: not beside matters; it is the older word for it")
    if claim.test in _NEEDS_MATTERS:
        if not (claim.matters or claim.margin):
            raise SettingsError(f"{where}.matters: missing; test {claim.test} needs it")
        if claim.matters and not all(claim.matters.values()):
            raise SettingsError(f"{where}.matters = 0: test {claim.test} needs more than 0")
    for key in sorted(given - needed - allowed - _EVERY_TEST):
        fields = ", ".join(sorted(needed | allowed))
        raise SettingsError(f"{where}.{key}: not for test {claim.test}, which knows {fields}")
    lengths = {len(claim.treatment), len(claim.control or (None,))} - {1}
    if len(lengths) > 1:
        raise SettingsError(
            f"{where}.control: {len(claim.control or ())} controls for {len(claim.treatment)} treatments; "
            "give one, or as many"
        )
    pairs = claim.pairs()
    if any(pair in pairs[:number] for number, pair in enumerate(pairs)):
        raise SettingsError(f"{where}.treatment: the same comparison twice")
    for treatment, control in pairs:
        same = control and treatment.model_copy(
            update={**control.model_dump(exclude_none=True), "minus": control.minus}
        )
        if same == treatment and not claim.steps:
            raise SettingsError(f"{where}.control: the same as the treatment")
    for selection in [*claim.treatment, *(claim.control or ()), *(claim.steps or ())]:
        if selection.minus and selection.minus.minus:
            raise SettingsError(f"{where}: a `minus` inside a `minus` is not possible")
    parts = claim.steps or claim.treatment
    if not all(part.variant for part in parts) and not all(part.variant for part in claim.treatment):
        raise SettingsError(f"{where}.treatment.variant: missing")
    if claim.targets and any(selection.target is not None for selection in claim.treatment):
        raise SettingsError(f"{where}.targets: the treatment fixes its target already")
    if claim.test == "diversity" and any(part.minus for part in (*claim.treatment, *(claim.control or ()))):
        raise SettingsError(f"{where}: vectors are not subtracted; test diversity takes no `minus`")
    if claim.scale == "ratio" and claim.value is not None and claim.value <= 0:
        raise SettingsError(f"{where}.value = {claim.value:g}: a ratio is compared with a positive number")
    floor, cap = claim.bounds or (None, None)
    if floor is not None and cap is not None and floor >= cap:
        raise SettingsError(
            f"{where}.bounds = [{floor:g}, {cap:g}]: the floor comes first, and is below the cap"
        )
    _check_numbers(claim, where)
    if claim.test == "trend":
        _check_trend(claim, where)


def _check_numbers(claim: Claim, where: str) -> None:
    """Whether numbers can be of what the metric is counted in: an accuracy of 90, say, is a percentage by mistake."""
    of = unit(claim.metric)
    if claim.scale == "ratio" or of is None:
        return
    if of == SHARE and claim.test in ("superiority", "difference", "noninferiority", "equivalence"):
        for key, table in (("matters", claim.matters), ("margin", claim.margin)):
            if table and max(table.values()) > 1:
                raise SettingsError(
                    f"{where}.{key} = {max(table.values()):g}: {claim.metric} is {of}, at most 1"
                )
    alone = claim.control is None and not any(selection.minus for selection in claim.treatment)
    if claim.value is not None and alone and not 0 <= claim.value <= (1 if of == SHARE else LARGEST):
        raise SettingsError(
            f"{where}.value = {claim.value:g}: {claim.metric} is {of}, at least 0"
            + (" and at most 1" * (of == SHARE))
        )


def _check_trend(claim: Claim, where: str) -> None:
    if claim.scale == "ratio":
        raise SettingsError(f"{where}.scale = 'ratio': a trend has a slope, not a ratio; use points or none")
    if claim.steps:
        if "x" in claim.model_fields_set:
            raise SettingsError(f"{where}.x: not together with steps, which have their own x")
        x = [step.x if step.x is not None else number for number, step in enumerate(claim.steps, start=1)]
        if len(set(x)) < len(x):
            raise SettingsError(f"{where}.steps: two steps have the same x")
    elif any(selection.target is not None for selection in claim.treatment):
        raise SettingsError(
            f"{where}.treatment.target: a trend runs over targets; leave it out, or give steps"
        )
