"""What others wrote, read within bounds: files, YAML as DVC reads it, JSON, and the numbers and names in them.

Whatever is wrong ends in a SettingsError of one short line that names the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import yaml
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema

MOST_YAML = 2**20
"""Bytes of a YAML file."""
MOST_BYTES = 2**30
"""Bytes of any other file that is read at once."""
MOST_NODES = 30_000
"""Keys and values of a YAML file, each alias counted with all that it stands for."""
DEPTH = 50
"""Lists and tables within one another."""
LONGEST_NAME = 100
_SHOWN = 80
"""Characters of a value that a message shows."""
_DIGITS = 100
"""Characters of a number."""


class SettingsError(Exception):
    """Settings, or other input, that cannot be used; the message is one clear line."""


def shown(value: Any) -> str:
    """The value as messages show it: its beginning, in one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def words(text: object) -> str:
    """A name, or what a library says of an error, as messages say it: as it is if that is one short line."""
    plain = str(text)
    return plain if len(plain) <= 2 * _SHOWN and plain.isprintable() else shown(plain)


def is_name(text: object) -> TypeGuard[str]:
    """Whether this may be the name of a profile, paper or architecture, of which files and commands are called."""
    return isinstance(text, str) and len(text) <= LONGEST_NAME and bool(re.fullmatch(r"\w[\w.-]*", text))


def name_option(text: str) -> str:
    """An option of a command that is such a name. Raises ArgumentTypeError."""
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: {NAME_RULE}")
    return text


NAME_RULE = f"a name must be letters, digits, '_', '-' and '.', at most {LONGEST_NAME}"


# ------------------------------------------------------------------------------------------ files


def read_bytes(file: str | os.PathLike, most: int = MOST_BYTES) -> bytes:
    """The content of an ordinary file of at most so many bytes. Raises SettingsError."""
    name = words(os.fspath(file))
    try:
        found = os.stat(file)
        # a pipe or a device may have no end
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise SettingsError(f"{name}: cannot be read: not an ordinary file")
        with open(file, "rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise SettingsError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{name}: cannot be read: {error}") from None
    if len(content) > most:
        raise SettingsError(f"{name}: cannot be read: larger than {most / 2**20:g} MiB")
    return content


def read_text(file: str | os.PathLike, most: int = MOST_BYTES) -> str:
    """As `read_bytes`, of UTF-8 text. Raises SettingsError."""
    return decoded(read_bytes(file, most), file)


def decoded(content: bytes, file: str | os.PathLike) -> str:
    """UTF-8 text. Raises SettingsError that names the file that it is from."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None


# ------------------------------------------------------------------------------------------ JSON


def json_value(text: str, finite: bool = False) -> Any:
    """What a JSON text holds. NaN and what is beyond all numbers become null.

    finite: whether they are errors. Raises ValueError, in one line, also for a key that is given twice, for halves of
    characters, and for what is nested deeper than DEPTH.
    """
    constant = _no_number if finite else _nothing
    try:
        value = json.loads(text, object_pairs_hook=_table, parse_float=_float, parse_constant=constant)
        # a half of a character may be written as an escape, but is no text
        if r"\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    except UnicodeEncodeError:
        raise ValueError("half of a character") from None
    level = [value]
    for _ in range(DEPTH):
        level = [
            item
            for held in level
            if isinstance(held, (dict, list))
            for item in (held.values() if isinstance(held, dict) else held)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {DEPTH} deep")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(twice)} is given twice")
    return table


def _float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _nothing(_text: str) -> None:
    return None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


# ------------------------------------------------------------------------------------------ YAML


# LibYAML, where PyYAML was built with it, reads these files ten times as fast
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads plain words and numbers as YAML 1.2 has them, with DVC: `1e-3` is a number, 010 is ten, `on` and 1:30 are words."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: dict[str | None, Callable[..., Any]] = {}


_TAG = "tag:yaml.org,2002:"
_MERGE, _DATE = f"{_TAG}merge", f"{_TAG}timestamp"
_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (
        "float",
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("int", r"[-+]?0b[0-1_]+|[-+]?0o[0-7_]+|[-+]?[0-9_]+|[-+]?0x[0-9a-fA-F_]+", "-+0123456789"),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "timestamp",
        r"[0-9]{4}-[0-9][0-9]-[0-9][0-9]|[0-9]{4}-[0-9][0-9]?-[0-9][0-9]?(?:[Tt]|[ \t]+)[0-9][0-9]?:[0-9][0-9]:[0-9][0-9]"
        r"(?:\.[0-9]*)?(?:[ \t]*(?:Z|[-+][0-9][0-9]?(?::[0-9][0-9])?))?",
        "0123456789",
    ),
)
for _name, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _whole(text: str) -> int:
    sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-").replace("_", "")
    base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2], 10)
    return sign * int(digits[2:] if base != 10 else digits, base)


def _fraction(text: str) -> float:
    return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))


def _truth(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1


def _plain(read: Callable[[str], Any], kind: str) -> Callable[[Any, yaml.ScalarNode], Any]:
    def construct(loader: Any, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            if len(text) <= _DIGITS:
                return read(text)
        except ValueError:
            pass
        raise _wrong(f"{shown(text)} is not {kind}, or too long", node)

    return construct


def _unknown(_loader: Any, node: yaml.Node) -> Any:
    if node.tag == _DATE:
        raise _wrong(f"{node.value} is read as a date: write it in quotes", node)
    raise _wrong(f"values of type {words(node.tag.removeprefix(_TAG))} are not read", node)


def _wrong(problem: str, place: Any) -> yaml.YAMLError:
    """The error that is raised at a node or event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


_Loader.add_constructor(f"{_TAG}int", _plain(_whole, "a whole number"))
_Loader.add_constructor(f"{_TAG}float", _plain(_fraction, "a number"))
_Loader.add_constructor(f"{_TAG}bool", _plain(_truth, "true or false"))
for _name in ("null", "str", "seq", "map"):
    _Loader.add_constructor(f"{_TAG}{_name}", yaml.SafeLoader.yaml_constructors[f"{_TAG}{_name}"])
_Loader.add_constructor(None, _unknown)


def read_yaml(file: str | os.PathLike) -> Any:
    """The content of a YAML file, as DVC reads it. Raises SettingsError naming the file, and the line of what is wrong."""
    text = read_text(file, MOST_YAML)
    try:
        _check_size(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(loader, node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        tab = " (a tab; indent by spaces)" if mark and text[mark.index : mark.index + 1] == "\t" else ""
        raise SettingsError(f"{file}{line}: not valid YAML: {words(problem)}{tab}") from None


def _check_size(text: str) -> None:
    """Raises YAMLError where a text, with all that its aliases stand for, is too much, too deep or of another version."""
    known: dict[str, tuple[int, int]] = {}  # size and height of what has an anchor
    # anchor, size and height of what is not at its end, from outside to inside
    open_: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent) and event.version not in (None, (1, 2)):
            raise _wrong("only YAML 1.2 is read", event)
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_.append((event.anchor, 1, 1))
        elif isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)):
            size, height = 1, 0
            if isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for anchor, _, _ in open_):
                    raise _wrong(f"*{words(event.anchor)} stands within itself", event)
                size, height = known.get(str(event.anchor), (1, 0))
            elif event.anchor:
                known[event.anchor] = (1, 0)
            _add(open_, size, height)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, size, height = open_.pop()
            if anchor:
                known[anchor] = (size, height)
            _add(open_, size, height)
        if len(open_) + open_[-1][2] > DEPTH + 1:
            raise _wrong(f"nested more than {DEPTH} deep", event)
        if open_[-1][1] > MOST_NODES:
            raise _wrong(f"more than {MOST_NODES:,} keys and values", event)


def _add(open_: list[tuple[str | None, int, int]], size: int, height: int) -> None:
    anchor, inside, highest = open_[-1]
    open_[-1] = anchor, inside + size, max(highest, height + 1)


def _check_keys(loader: Any, root: yaml.Node) -> None:
    """Raises YAMLError for a key that is given twice, or is no word or number."""
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _wrong("a key must be a word or a number", key)
                name = "<<" if key.tag == _MERGE else loader.construct_object(key)
                if name in seen:
                    raise _wrong(f"key {shown(name)} is given twice", key)
                seen.add(name)


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node, each once."""
    found, waiting = {id(root)}, [root]
    while waiting:
        yield (node := waiting.pop())
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        for item in (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))):
            if id(item) not in found:
                found.add(id(item))
                waiting.append(item)


# ------------------------------------------------------------------------------------------ values


def _exact(schema: Any) -> Any:
    """The schema with all plain values in it taken as they are."""
    if isinstance(schema, dict):
        strict = {"strict": True} if schema.get("type") in ("int", "float", "bool", "str") else {}
        kept = ("default", "expected", "metadata")  # these hold values, and no schemas
        return {key: value if key in kept else _exact(value) for key, value in schema.items()} | strict
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_exact, schema))
    return schema


class Exact(BaseModel):
    """Base of what is read: a number is no text and no truth value, and neither of them is a number."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _exact(handler(source))
