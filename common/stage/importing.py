"""`python -m replications import FOLDER`: take in what stages left in the results folder of another machine.

Everything is checked first, then all files are put in place together. The caller then logs the runs to MLflow as if
they had happened here, and has DVC accept the complete stages as done. What a stage had finished when it was stopped is
taken in as well, if that is asked for; its runs are kept so that a machine of the same kind goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.core.identity import canonical
from common.core.run import Run
from common.predictions import Predictions, check, predictions_file, unpacked
from common.profiles import selected_profile
from common.reading import decoded, json_value, read_bytes, shown, words
from common.records import LARGEST, Curves, Entry, Line, Record, curves_file, parsed
from common.settings import PARAMS_FILE, SettingsError, hint, validated
from common.stage import partial, pipeline, resolve
from common.stage.looks import first_look
from common.stage.papers import load, papers
from common.stage.recorded import recorded
from common.stage.records import Beside, Made, environment_file, results_files
from common.stage.store import SCRATCH, StageError, Store, code_digest, data_prints

_PENDING, _UNFINISHED = ".import", ".import.tmp"
_MISSING = object()
_NAMED = 5
"""How many differences an error names."""
_LEFT = ("settings", "settings_hash", "data", "metrics", "cost", "details")
"""What a stage has written of each run, though a record that is only judged may lack it."""


class _Partial(Made):
    """Of what a stage has left that is not complete."""

    numerics: list[str | bool | int]


@dataclass(frozen=True)
class Imported:
    """A stage of the other machine.

    environment, entries: as the stage had them there. files: content by path below the results folder. listed: settings
    hashes of all runs that are listed here. runs: those of the entries, of a stage that is not complete. unfinished: how many
    more are in the first look.
    """

    paper: str
    profile: str
    environment: dict[str, Any]
    entries: list[Entry]
    files: dict[Path, bytes]
    listed: set[str]
    runs: list[Run] = field(default_factory=list)
    unfinished: int = 0


def take_in(
    folder: Path,
    results: Path,
    only: Sequence[str] = (),
    params: str = PARAMS_FILE,
    unfinished: bool = False,
) -> list[Imported]:
    """Check the stages in `folder` (those of the papers in `only`, or all) and put their files into `results`.

    They are of the profile that `params` selects. unfinished: also take in what stages have left that are not complete;
    such results are later than complete ones of the same stage, which removes them. Raises StageError, SettingsError,
    with nothing changed, for what does not fit this project.
    """
    _finish(results)
    profile = selected_profile(params)
    there = _found(folder, profile, only, params, unfinished)
    stages = [
        _checked_part(folder, paper, profile, params) if part else _checked(folder, paper, profile, params)
        for paper, part in sorted(there.items())
    ]
    for stage in stages:
        _loses_nothing(stage, results)
    files = {path: content for stage in stages for path, content in stage.files.items()}
    _in_the_way(files, results)
    _put(files, results)
    for stage in stages:
        _keep(stage)
    return stages


def _keep(stage: Imported) -> None:
    """Let a stage that is not complete go on from its runs, where runs are executed as these were."""
    if stage.unfinished:
        store = Store(SCRATCH / stage.profile / stage.paper, numerics=stage.environment["numerics"])
        for run, entry in zip(stage.runs, stage.entries, strict=True):
            if store.load(run) is None:
                store.save(run, entry, None)


def accept(stages: Sequence[str]) -> str | None:
    """Have `dvc repro` take the stages' outputs as they are; returns why not where there is no DVC.

    Raises StageError, SettingsError.
    """
    resolve.write()  # what the stages depend on of params.yaml
    command = ["dvc", "commit", "--force", "settings", *stages]
    if find_spec("dvc") is None:
        return f"dvc is not installed here: `{' '.join(command)}` makes `dvc repro` accept these stages"
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[0]
        raise StageError(f"the records are imported, but `{' '.join(command)}` failed: {reason}")
    return None


# ------------------------------------------------------------------------------------------ checks


def _found(folder: Path, profile: str, only: Sequence[str], params: str, unfinished: bool) -> dict[str, bool]:
    """The papers of which the folder holds something in this profile, and whether it is from an incomplete stage."""
    there: dict[str, dict[str, bool]] = {}
    parts = f"{partial.FOLDER}/*/*.jsonl"
    for pattern in ("*/*.jsonl", "environment/*/*.json", *([parts] if unfinished else [])):
        for file in sorted(folder.glob(pattern)):
            there.setdefault(file.parent.name, {})[file.name.split(".")[0]] = pattern == parts
    if not there:
        more = "; `--partial` takes what its stages have finished" if any(folder.glob(parts)) else ""
        raise StageError(f"{folder}: not a results folder: it holds no <profile>/<paper>.jsonl{more}")
    if profile not in there:
        raise StageError(
            f"{folder}: results of profile {', '.join(map(words, sorted(there)))}, but {params} selects {profile}; "
            f"select it with `profile: {words(min(there))}`"
        )
    for paper in sorted(there[profile]):
        if paper not in papers():
            raise StageError(f"{folder}: unknown paper {shown(paper)}; {hint(paper, papers())}")
    for paper in only:
        if paper not in there[profile]:
            raise StageError(
                f"{folder}: nothing of paper {shown(paper)}; {hint(paper, sorted(there[profile]))}"
            )
    return {paper: there[profile][paper] for paper in only or there[profile]}


def _checked(folder: Path, paper: str, profile: str, params: str) -> Imported:
    records = Path(profile, f"{paper}.jsonl")
    curves, predictions = curves_file(records), predictions_file(records)
    beside = environment_file(profile, paper)
    files = {path: _read(folder / path) for path in (records, curves, predictions, beside)}
    about = _environment(files[beside], folder / beside)
    for path in (records, curves, predictions):
        if about.sha256.get(path.name) != hashlib.sha256(files[path]).hexdigest():
            raise StageError(
                f"{folder / path}: damaged or changed: its SHA-256 is not the one in {folder / beside}"
            )
    runs, needed = _listed(paper, profile, params, about, folder / beside)
    rows = list(_records(files[records], folder / records))
    of_curves = [line for _, line in _lines(files[curves], folder / curves, Curves)]
    hashes = [row.settings_hash for row in rows]
    if [row.settings_hash for row in of_curves] != hashes:
        raise StageError(f"{folder / curves}: not the curves of the runs in {records.name}")
    if missing := set(hashes) - set(about.seconds):
        raise StageError(f"{folder / beside}: seconds of run {min(missing)} are missing")
    _fit(rows, runs, folder / records, needed)
    predicted = _predictions(rows, files[predictions], folder / predictions)
    if find_spec("dvc") is not None:
        for made, producer in pipeline.producers(paper).items():
            if not Path(made).exists():
                raise StageError(
                    f"{paper} depends on {made}, which is not there: `dvc repro {producer}` makes it"
                )
    entries = [
        Entry(
            record=row,
            curves=own.curves,
            seconds=about.seconds[row.settings_hash],
            ended=about.ended.get(row.settings_hash),
            machine=about.elsewhere.get(row.settings_hash, about.machine),
            predictions=row.predictions and predicted[row.predictions].text,
            measured=about.measured.get(row.settings_hash),
        )
        for row, own in zip(rows, of_curves)
    ]
    return Imported(
        paper,
        profile,
        about.model_dump(exclude_unset=True),
        entries,
        files,
        {run.settings_hash for run in runs},
    )


def _checked_part(folder: Path, paper: str, profile: str, params: str) -> Imported:
    """What a stage has finished that is not complete, in the order of a complete one."""
    file = partial.partial_file(folder, profile, paper)
    content, entries = partial.read(file)
    about = _valid(_Partial, content, f"{file}, line 1")
    listed, needed = _listed(paper, profile, params, about, file)
    _fit([entry.record for entry in entries], listed, file)
    found = {entry.record.settings_hash: entry for entry in entries}
    runs = [run for run in listed if run.settings_hash in found]
    entries = [found[run.settings_hash] for run in runs]
    unfinished = sum(run.settings_hash not in found for run in needed)
    environment = about.model_dump(exclude_unset=True) | ({"unfinished": unfinished} if unfinished else {})
    try:
        files = results_files(profile, paper, entries, environment)
    except ValueError as error:
        raise StageError(f"{file}: predictions that are not readable: {error}") from None
    _predictions(
        [entry.record for entry in entries], files[predictions_file(Path(profile, f"{paper}.jsonl"))], file
    )
    hashes = {run.settings_hash for run in listed}
    return Imported(paper, profile, environment, entries, files, hashes, runs, unfinished)


def _listed(paper: str, profile: str, params: str, about: Made, where: Path) -> tuple[list[Run], list[Run]]:
    """The runs that the paper lists here, and those without which a stage is not complete.

    Raises StageError if other code has made what is to be imported.
    """
    settings = load(paper, params, profile)
    runs = pipeline.listed(paper, settings)
    code = code_digest(runs)
    if about.code != code:
        raise StageError(
            f"{where}: made by other code (digest {about.code[:12]}, here {code[:12]}); "
            "use the same revision of the project on both machines"
        )
    return runs, first_look(runs, settings)


def _fit(records: Sequence[Record], runs: Sequence[Run], where: Path, needed: Sequence[Run] = ()) -> None:
    """Raises StageError if the records are not those of listed runs, and of all that are needed."""
    if problems := list(_problems(records, runs, needed)):
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise StageError(f"{where}: {'; '.join(problems[:_NAMED])}{more}")


def _predictions(records: Sequence[Record], content: bytes, file: Path) -> dict[str, Predictions]:
    """Those of the records, by digest. Raises StageError where they are not."""
    try:
        check(records, found := unpacked(content, file), file)
    except SettingsError as error:
        raise StageError(str(error)) from None
    return found


def _loses_nothing(stage: Imported, results: Path) -> None:
    """Raises StageError if results here hold finished runs, of those that are listed, that a stage lacks."""
    try:
        here = recorded(results, stage.profile, stage.paper, stage.environment["code"])
    except SettingsError:
        return  # damaged files hold nothing, and these take their place
    taken = {entry.record.settings_hash for entry in stage.entries}
    if here and (lost := (here.hashes & stage.listed) - taken):
        unfinished = f", of which {stage.unfinished} runs are not finished" if stage.unfinished else ""
        raise StageError(
            f"{here.file}: holds {len(lost)} finished runs that the results to be imported lack{unfinished}; "
            "move it away to take these in its place"
        )


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except SettingsError as error:
        raise StageError(f"{error}; a stage leaves it beside its records") from None


def _environment(content: bytes, file: Path) -> Beside:
    try:
        return _valid(Beside, json_value(decoded(content, file), finite=True), str(file))
    except ValueError as error:
        raise StageError(f"{file}: not valid JSON: {error}") from None


def _valid(kind: type[Line], content: Any, where: str) -> Line:
    try:
        return validated(kind, content, where)
    except SettingsError as error:
        raise StageError(str(error)) from None


def _lines(content: bytes, file: Path, kind: type[Line]) -> Iterator[tuple[str, Line]]:
    try:
        yield from parsed(content, file, kind, finite=True)
    except SettingsError as error:
        raise StageError(str(error)) from None


def _records(content: bytes, file: Path) -> Iterator[Record]:
    for where, record in _lines(content, file, Record):
        for name in _LEFT:
            if name not in record.model_fields_set:
                raise StageError(f"{where}: {name} is missing")
        yield record


def _problems(records: Sequence[Record], runs: Sequence[Run], needed: Sequence[Run]) -> Iterator[str]:
    """In what the records are not those of listed runs, and of all that are needed."""
    listed = {tuple(run.identity.values()): run for run in runs}
    for record in records:
        run = listed.pop(tuple(record.identity.values()), None)
        if run is None:
            yield f"{record.name} is given twice or not listed here"
            continue
        ours = json.loads(canonical(run.settings))
        if differences := list(_differences("settings", record.settings, ours)):
            yield f"{run}: {differences[0]}"
        elif record.settings_hash != run.settings_hash:
            yield f"{run}: settings_hash is not that of its settings and of the runs that it needs here"
        if record.data != (prints := data_prints(run)):
            yield f"{run}: data = {_short(record.data)}, but the data prepared here is {_short(prints)}"
        yield from (f"{run}: {problem}" for problem in _invalid(record))
    missing = {id(run) for run in listed.values()}
    yield from (f"{run} is missing" for run in needed if id(run) in missing)


def _invalid(record: Record) -> Iterator[str]:
    if record.status == "failed" and not record.reason:
        yield "it failed without a reason"
    if record.status == "ok" and record.failure:
        yield f"failure = {record.failure!r}, but it has not failed"
    if (record.failure == "needs") != (record.cause is not None):
        yield "a failure of kind 'needs', and no other, has a cause"
    if record.status == "ok" and record.metrics.get("test_accuracy") is None:
        yield "it has finished without a test_accuracy"
    for name, value in (*record.metrics.items(), *record.cost.items()):
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            yield f"{name} = {shown(value)}: must be at most {LARGEST:g}"


def _differences(where: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}):
            yield from _differences(f"{where}.{key}", theirs.get(key, _MISSING), ours.get(key, _MISSING))
    elif theirs != ours:
        both = ("absent" if value is _MISSING else shown(value) for value in (theirs, ours))
        yield "{} = {}, here {}".format(words(where), *both)


def _short(prints: Sequence[str]) -> str:
    return ", ".join(str(fingerprint)[:12] for fingerprint in prints) or "none"


# ------------------------------------------------------------------------------------------ all files or none


def _in_the_way(files: Iterable[Path], results: Path) -> None:
    """Raises StageError where a file cannot be put in its place, because a folder or another file is in the way."""
    for path in files:
        target = results / path
        blocked = [target] if target.is_dir() else []
        blocked += [folder for folder in target.parents if folder.exists() and not folder.is_dir()]
        if blocked:
            raise StageError(f"{blocked[0]}: in the way of {target}; nothing was imported")


def _put(files: Mapping[Path, bytes], results: Path) -> None:
    """Put files in place; what is killed before all are complete changes nothing, what is killed later is finished."""
    unfinished = results / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for path, content in files.items():
            target = unfinished / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        os.replace(unfinished, results / _PENDING)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StageError(f"{results}: {error.strerror}; nothing was imported") from None
    _finish(results)


def _finish(results: Path) -> None:
    """Move files that are complete to where they belong, also those of an import that was killed while it did so."""
    pending = results / _PENDING
    for file in sorted(path for path in pending.rglob("*") if path.is_file()):
        target = results / file.relative_to(pending)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        except OSError as error:
            raise StageError(f"{target}: {error.strerror}; the same command puts the rest in place") from None
    shutil.rmtree(pending, ignore_errors=True)
