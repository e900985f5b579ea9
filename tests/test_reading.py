"""What others wrote, read within bounds: YAML as DVC reads it, JSON, files, and the names in them."""

import os

import pytest
from dvc.utils.serialize import parse_yaml

from common.reading import (
    DEPTH,
    MOST_YAML,
    is_name,
    json_value,
    read_bytes,
    read_text,
    read_yaml,
    shown,
    words,
)
from common.settings import SettingsError, validated
from common.statistics.claims import Claim

WORDS = (
    "1 010 -010 0o10 0o8 0x1F 0X1f 0b11 0b2 1_000 1_ _1 00 +1 -0 5e-1 5E3 1e5 1e 1e+5 .5 5. .5e-1 .5e1 +.5e-3 1.5e3 -1e-3 12e03 "
    "1.2.3 1:30 1:30.5 190:20:30 on off On yes no y n true True TRUE tRUE false null Null ~ .inf -.inf +.inf '010'"
).split()


def _read(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(file)


def test_every_word_is_what_dvc_takes_it_for(tmp_path):
    # as a value, an item and a key; equal numbers of different kinds differ as text
    text = "\n".join(f"- {line}" for word in WORDS for line in (word, f"[{word}]", f"{{{word}: {word}}}"))
    assert repr(_read(tmp_path, text)) == repr(parse_yaml(text, "a.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "b: &b {x: 1, y: 2}\na: {<<: *b, y: 3}\n",
        "b: &b {x: 1}\nc: &c {x: 2, z: 1}\na: {<<: [*b, *c], y: 3}\n",
        "a: &b {<<: &c {x: 1, <<: {x: 2}}}\nd: *c\n",
        "%YAML 1.2\n---\na: on\n",
        "- &x {a: [1, 2]}\n- *x\n",
        "a: !!int 010\nb: !!float 1\nc: 5\n",
    ],
)
def test_merge_keys_aliases_and_tags_are_what_dvc_takes_them_for(tmp_path, text):
    assert repr(_read(tmp_path, text)) == repr(parse_yaml(text, "a.yaml"))


def _bomb(last):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, last + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_bomb(8), "a.yaml, line 5: not valid YAML: more than 30,000 keys and values"),
        ("\n".join(f"k{i}: {i}" for i in range(20_000)), "more than 30,000 keys and values"),
        ("a: [" + "0," * 40_000 + "]", "more than 30,000 keys and values"),
        ("a: " + "[" * 3_000 + "]" * 3_000, "nested more than 50 deep"),
        ("[" * 200_000, "nested more than 50 deep"),
        ("{a: " * (DEPTH + 1) + "1" + "}" * (DEPTH + 1), "nested more than 50 deep"),
        (
            "b: &b " + "[" * 30 + "]" * 30 + "\na: " + "[" * 30 + "*b" + "]" * 30,
            "line 2: not valid YAML: nested more",
        ),
        ("a: " + "x" * MOST_YAML, "cannot be read: larger than 1 MiB"),
        ("a: " + "9" * 5_000, "is not a whole number, or too long"),
        ("a: 0x" + "9" * 5_000, "is not a whole number, or too long"),
        ("a: !!float abc", "line 1: not valid YAML: 'abc' is not a number"),
        ("a: !!bool maybe", "'maybe' is not true or false"),
        ("a: 2001-01-01", "2001-01-01 is read as a date: write it in quotes"),
        ("a: 2001-99-99", "2001-99-99 is read as a date"),
        ("a: &a [*a]", "*a stands within itself"),
        ("a: *b", "found undefined alias"),
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML: key 'a' is given twice"),
        ("1: a\n1.0: b", "is given twice"),
        ("a: {<<: {x: 1}, <<: {y: 1}}", "key '<<' is given twice"),
        ("<<: 1", "expected a mapping"),
        ("? [a]\n: 1", "a key must be a word or a number"),
        ("a: !!set {x}", "values of type set are not read"),
        ("a: !!binary aGVsbG8=", "values of type binary are not read"),
        (
            "a: !!python/object/apply:os.system ['true']",
            "values of type python/object/apply:os.system are not read",
        ),
        ("%YAML 1.1\n---\na: on", "only YAML 1.2 is read"),
        ("---\na: 1\n---\nb: 1", "another document"),
        (b"a: \xe9", "a.yaml: not UTF-8 text"),
        ("a: b".encode("utf-16"), "a.yaml: not UTF-8 text"),
        ("a: \0", "unacceptable character"),
        ('a: "\\ud800"', "invalid Unicode character"),
        (
            "a:\n\tb: 1",
            "line 2: not valid YAML: found character that cannot start any token (a tab; indent by spaces)",
        ),
    ],
)
def test_damage_is_one_short_line_that_names_the_file(tmp_path, text, message):
    with pytest.raises(SettingsError) as error:
        _read(tmp_path, text)
    found = str(error.value)
    assert message in found and str(tmp_path / "a.yaml") in found and found.isprintable() and len(found) < 500


def test_files_without_an_end_and_paths_that_are_none_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file, message in (
        (tmp_path / "pipe", "not an ordinary file"),
        ("/dev/zero", "not an ordinary file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        ("a\0b", "null byte"),
        ("a" * 5_000, "File name too long"),
    ):
        with pytest.raises(SettingsError, match=f"cannot be read: .*{message}"):
            read_bytes(file)
    (tmp_path / "long").write_bytes(b"12345")
    assert read_text(tmp_path / "long", most=5) == "12345"
    with pytest.raises(SettingsError, match="larger than"):
        read_bytes(tmp_path / "long", most=4)


def test_json_has_numbers_and_no_surprises():
    assert json_value('{"a": [1, NaN, -Infinity, 1e999, 1e300, {"b": true}]}') == {
        "a": [1, None, None, None, 1e300, {"b": True}]
    }
    for text, message in (
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested more than 50 deep"),
        ("[" * 100_000, "nested more than 50 deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ('"\\uD800"', "half of a character"),
        ("9" * 5_000, "4300 digits"),
        ('{"a": ', "Expecting value"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            json_value(text)
        assert "\n" not in str(error.value)
    assert json_value("[" * DEPTH + "]" * DEPTH) and json_value('"\\ud83d\\ude00"') == "😀"
    with pytest.raises(ValueError, match="NaN is no number"):
        json_value("[NaN]", finite=True)


def test_names_are_letters_digits_and_little_else():
    assert all(map(is_name, ("digits", "cifar10-cpu", "my_profile.2", "2024", "é", "_a")))
    wrong = (
        "",
        ".",
        "..",
        "../a",
        "/a",
        "a/b",
        "-x",
        "a b",
        "a\n",
        "it's",
        "x;y",
        "$(x)",
        "`x`",
        "a\0",
        "a" * 101,
        5,
        None,
    )
    assert not any(map(is_name, wrong))


def test_values_in_messages_are_one_short_line():
    for value in ("x" * 10**6, "a\nb", ["y"] * 10**5, "\ud800", "\x1b[31m"):
        assert len(shown(value)) <= 80 and shown(value).isprintable()
        assert len(words(value)) <= 160 and words(value).isprintable()
    assert words("a name") == "a name"


def test_a_number_is_no_text_and_no_truth_value():
    claim = {"id": "a", "statement": "s", "treatment": [], "test": "superiority"}
    for key, value in (("seen", True), ("seen", "3"), ("value", "0.5"), ("matters", True), ("note", 5)):
        with pytest.raises(SettingsError, match=rf"f\.{key}.* = {value!r}"):
            validated(Claim, claim | {key: value}, "f")
