"""What people and other machines may hand in, kind by kind: one short line that names file and key, at once, or the same numbers.

Damaged YAML and JSON themselves are in test_reading.py, imports in test_import.py.
"""

import copy
import json
import os
import random
import shutil
import sys

import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from reporting import arguments, small_project

from common.profiles import profile_looks
from common.reading import read_yaml
from common.report import command as report
from common.settings import SettingsError
from common.stage.papers import load
from common.statistics import __main__ as statistics

PARAMS = {"profile": "p", "profiles": {"p": {"dataset": {"source": "digits"}}}}


def _one_line(message, file):
    assert str(file) in message and message.strip().isprintable() and len(message) < 1200, message
    return message


# ------------------------------------------------------------------------------------------ params.yaml


def _params(tmp_path, text):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["2024", "1e3", "~", "5", "true", "010", "1_000"])
def test_a_name_that_is_no_word_is_refused_and_one_in_quotes_is_not(tmp_path, name):
    file = _params(tmp_path, f"profile: {name}\nprofiles: {{{name}: {{}}}}\n")
    with pytest.raises(SettingsError, match="profiles: .*a name must be letters.*numbers in quotes") as error:
        load("halo", file)
    _one_line(str(error.value), file)
    _params(tmp_path, f"profile: '{name}x'\nprofiles: {{'{name}x': {{}}}}\n".replace("~", "a"))
    assert load("halo", file).name == f"{name}x".replace("~", "a")


@pytest.mark.parametrize("name", ["on", "yes", "a.b-c_d", "1:30"])
def test_words_of_yaml_1_1_are_words(tmp_path, name):
    file = _params(tmp_path, f"profile: {name}\nprofiles: {{{name}: {{}}}}\n")
    if ":" in name:
        with pytest.raises(SettingsError, match="profiles: '1:30': a name must be"):
            load("halo", file)
    else:
        assert load("halo", file).name == name


@pytest.mark.parametrize(
    "name",
    [
        "x; touch PWNED #",
        "$(touch PWNED)",
        "../../escaped",
        "/tmp/x",
        "",
        ".",
        "it's",
        "a\0",
        "a\n",
        "a" * 300,
    ]
    + ["environment", "partial", "-x", "a b"],
)
def test_no_name_reaches_a_shell_or_another_folder(tmp_path, name):
    file = _params(tmp_path, yaml.safe_dump({"profile": name, "profiles": {name: {}}}))
    with pytest.raises(SettingsError, match="profiles: .*(a name must be|a folder of this name)") as error:
        load("halo", file)
    _one_line(str(error.value), file)


def test_no_command_of_the_pipeline_has_text_of_a_settings_file_in_it():
    stages = read_yaml("dvc.yaml")["stages"]
    assert len(stages) > 8 and not [name for name, stage in stages.items() if "$" in stage["cmd"]]


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("execution.threads", 1099511627776, "less than or equal to 1024"),
        ("execution.threads", 1000000, "less than or equal to 1024"),
        ("execution.workers", 0, "'auto'"),
        ("execution.deterministic", "yes", "boolean"),
        ("dataset.train", 10**11, "less than or equal to"),
        ("dataset.split_seed", True, "integer"),
        ("dataset", {"source": "npz", "path": "a\0b"}, "must be text in one line"),
        ("dataset", {"source": "folder", "path": "/"}, "needs a path that ends in a name"),
        ("seeds", {"first": 0, "count": 10**8}, "less than or equal to 1000"),
        ("seeds", {"first": 0, "count": 8, "looks": [1e1]}, "integer"),
        ("halo.seeds", list(range(1001)), "at most 1000"),
        ("halo.seeds", [True, False], "integer"),
        ("halo.seeds", ["1"], "integer"),
        ("halo.fine_tuning_epochs", "6", "integer"),
        ("halo.fine_tuning_epochs", "1:30", "integer"),
        ("halo.fine_tuning_epochs", 10**30, "less than or equal to 1000000"),
        ("halo.training", {"epochs": 10**30}, "less than or equal to 1000000"),
        ("halo.training", {"learning_rate": 1e308}, f"less than or equal to {10**30}"),
        ("halo.training", {"learning_rate": float("inf")}, "finite"),
        ("halo.targets", [0.5, 0.5000000001], "must not repeat a value"),
        ("halo.targets", [0.5] * 2000, "must not repeat a value"),
        ("halo.layers", "x" * 200_000, "'conv'"),
        ("halo", {f"k{i}": 1 for i in range(2_000)}, "unknown key"),
        ("halo", {5: 1}, "Keys should be strings"),
        ("halo.variants", {5: "all"}, "variants[5]"),
        (5, {}, "unknown key"),
        ("a\nb", {}, "unknown key"),
        ("x" * 200_000, {}, "unknown key"),
        ("extends", ["p"], "unknown profile"),
        ("extends", 5, "unknown profile"),
        ("halo", "x" * 200_000, "must be a table"),
    ],
)
def test_a_wrong_value_is_refused_at_once(tmp_path, path, value, part):
    content = copy.deepcopy(PARAMS)
    *outer, last = path.split(".") if isinstance(path, str) else [path]
    block = content["profiles"]["p"]
    for name in outer:
        block = block.setdefault(name, {})
    block[last] = value
    file = _params(tmp_path, yaml.safe_dump(content))
    with pytest.raises(SettingsError) as error:
        load("halo", file)
    assert part in _one_line(str(error.value), file)


def test_profiles_that_extend_one_another_without_an_end_are_refused(tmp_path):
    profiles = "".join(f"  p{i}: {{extends: p{i + 1}}}\n" for i in range(60))
    file = _params(tmp_path, f"profile: p0\nprofiles:\n{profiles}  p60: {{}}\n")
    with pytest.raises(SettingsError, match="more than 50 profiles extend one another"):
        profile_looks(file)


def test_a_number_is_the_one_that_dvc_records(tmp_path):
    text = "profile: p\nprofiles:\n  p:\n    seeds: &s {first: 010, count: 2}\n    imp_slr:\n"
    text += "      <<: &base {targets: [5e-1, 9e-1]}\n      cells: [{architecture: mlp, options: {norm_scale: 5e-1}}]\n"
    file = _params(tmp_path, text)
    theirs, profile = parse_yaml(text, "params.yaml")["profiles"]["p"], load("imp_slr", file)
    assert profile.paper.seeds == (10, 11) and theirs["seeds"]["first"] == 10
    assert list(profile.paper.targets) == theirs["imp_slr"]["targets"] == [0.5, 0.9]
    assert profile.paper.cells[0].options == theirs["imp_slr"]["cells"][0]["options"] == {"norm_scale": 0.5}


# ------------------------------------------------------------------------------------------ records and claims


def _record(variant, seed, accuracy):
    named = {"paper": "demo", "variant": variant, "dataset": "digits", "architecture": "mlp", "target": 0.9}
    measured = {"metrics": {"test_accuracy": accuracy, "test_loss": 0.4}, "cost": {"macs": 5}, "details": {}}
    kept = {"settings": {"epochs": 3}, "settings_hash": f"{variant}{seed}", "data": ["d"], "chance": 0.1}
    return {**named, "seed": seed, "status": "ok", **kept, **measured}


RECORDS = [_record("new", s, 0.9 + 0.001 * s) for s in range(8)] + [_record("old", s, 0.85) for s in range(8)]
CLAIM = {
    "id": "H1",
    "statement": "New beats old.",
    "treatment": {"variant": "new"},
    "control": {"variant": "old"},
    "test": "superiority",
    "direction": "higher",
}


@pytest.fixture
def judged(tmp_path, capsys):
    """A function that judges these records by these claims (text, or what changes one) and returns the verdicts or the error."""

    def judged(records=None, claims=None):
        file, claimed, out = (tmp_path / name for name in ("demo.jsonl", "claims.yaml", "v.json"))
        lines = [json.dumps(record) for record in RECORDS]
        if isinstance(records, dict):
            changed = copy.deepcopy(RECORDS[0])
            for key, value in records.items():
                (changed["metrics"] if key in changed["metrics"] else changed)[key] = value
            lines[0] = json.dumps(changed)
        file.write_text(records if isinstance(records, str) else "\n".join(lines))
        entry = {key: value for key, value in (CLAIM | (claims or {})).items() if value is not None}
        claimed.write_text(yaml.safe_dump({"paper": "demo", "claims": [entry]}))
        status = statistics.main(["--records", str(file), "--claims", str(claimed), "--out", str(out)])
        error = capsys.readouterr().err
        if status == 0:
            return json.loads(out.read_text())["papers"]["demo"]["claims"][0]
        assert status == 2 and error.count("\n") == 1 and error.startswith("error: ")
        return _one_line(error, tmp_path)

    return judged


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"test_accuracy": 1.7}, "line 1.metrics: test_accuracy = 1.7: must be a number from 0 to 1"),
        ({"test_accuracy": -3}, "test_accuracy = -3"),
        ({"test_accuracy": True}, "test_accuracy = True"),
        ({"test_accuracy": "0.9"}, "test_accuracy = '0.9'"),
        ({"test_accuracy": 1e308}, "test_accuracy = 1e+308"),
        ({"test_accuracy": 10**400}, "test_accuracy = 1000"),
        ({"test_loss": 1e200}, "test_loss = 1e+200"),
        ({"cost": {"macs": -5}}, "line 1.cost: macs = -5"),
        ({"cost": {"theoretical_speedup": 1e-300}}, "must be 0 or a number from 1e-24 to 1e+24"),
        ({"cost": {"theoretical_speedup": "2"}}, "theoretical_speedup = '2'"),
        ({"seed": "0"}, "line 1.seed = '0'"),
        ({"seed": True}, "line 1.seed = True"),
        ({"seed": -1}, "line 1.seed = -1"),
        ({"seed": 10**30}, "line 1.seed = 1000"),
        ({"target": "0.9"}, "line 1.target = '0.9'"),
        ({"target": 1e300}, "line 1.target = 1e+300"),
        ({"paper": "../x"}, "line 1.paper = '../x': a name must be"),
        ({"variant": ""}, "line 1.variant = ''"),
        ({"variant": "a\nb"}, "line 1.variant = 'a\\nb'"),
        ({"variant": "x" * 10**6}, "line 1.variant = 'xxx"),
        ({"variant": "\ud800"}, "line 1: not valid JSON (half written?): half of a character"),
        ({"reason": {"a": 1}}, "line 1.reason"),
        ({"status": "failed", "reason": "x" * 10**6}, "line 1.reason = 'xxx"),
        ({"details": {"a": eval("[" * 60 + "]" * 60)}}, "nested more than 50 deep"),
        (
            {"settings": {"layers": [{"epochs": 1}] * 6000}},
            "line 1.settings: more than 10,000 keys and values",
        ),
        ('{"seed": 0, "seed": 1}', "line 1: not valid JSON (half written?): key 'seed' is given twice"),
        ("[]", "line 1 = []: must be a table"),
    ],
)
def test_a_wrong_record_is_no_evidence(judged, change, part):
    assert part in judged(change)


def test_what_is_no_measurement_is_lost_by_name_and_changes_no_other_number(judged):
    whole = judged()["comparisons"][0]
    for value in (None, float("nan"), float("inf")):
        found = judged({"test_accuracy": value})["comparisons"][0]
        assert found["n"] == 7 and found["values"] == whole["values"][1:] and found["lost"][0]["seed"] == 0
    other = judged({"data": ["z"]})["comparisons"][0]
    assert other["n"] == 7 and "tested on other data" in other["lost"][0]["reason"]
    assert "not of one arm" in judged({"settings": {"epochs": 30}})["reason"]
    many = judged({"settings": {f"k{i}": i for i in range(9_000)}})["reason"]
    assert "settings epochs, k0, k1, k10, k100 and 8996 more" in many


def test_more_seeds_than_can_be_judged_are_refused(judged):
    many = (_record("new", seed, 0.5) for seed in range(1001))
    assert "one of more than 1,000 seeds" in judged("\n".join(map(json.dumps, many)))


@pytest.mark.parametrize(
    ("claim", "part"),
    [
        ({"matters": 50}, "claim H1.matters = 50: test_accuracy is a share of images, at most 1"),
        ({"margin": 50}, "claim H1.margin = 50"),
        ({"matters": True}, "matters.other = True"),
        ({"matters": "0.1"}, "matters.other = '0.1'"),
        ({"matters": 1e300}, "matters.other = 1e+300"),
        ({"matters": float("inf")}, "finite"),
        (
            {"test": "threshold", "control": None, "value": 90},
            "claim H1.value = 90: test_accuracy is a share",
        ),
        ({"test": "count", "control": None, "value": -1}, "claim H1.value = -1"),
        ({"test": "count", "control": None, "value": -1, "metric": "cost.macs"}, "at least 0"),
        ({"targets": [0.9, 0.9]}, "must not repeat a value"),
        ({"targets": [n / 100 for n in range(51)]}, "at most 50"),
        ({"targets": [0.9, 0.9 + 1e-11]}, "must not repeat a value"),
        ({"treatment": [{"variant": "new"}] * 2}, "claim H1.treatment: the same comparison twice"),
        ({"treatment": {"variant": "x" * 3000}}, "treatment.variant = 'xxx"),
        ({"id": [1]}, "id = [1]"),
        ({"id": "a\nb"}, "id = 'a\\nb'"),
        ({"statement": "a" * 20_000}, "statement = 'aaa"),
        ({"precondition": {"variant": "a", "not worse than": "b", "by": 50}}, "precondition.by = 50"),
        ({5: 1}, "Keys should be strings"),
        ({"direction": "on"}, "direction = 'on'"),
    ],
)
def test_a_wrong_claim_is_refused(judged, claim, part):
    assert part in judged(claims=claim)


def test_more_claims_than_can_be_judged_are_refused(tmp_path, capsys):
    file = tmp_path / "claims.yaml"
    file.write_text(
        yaml.safe_dump({"paper": "demo", "claims": [CLAIM | {"id": f"H{i}"} for i in range(201)]})
    )
    status = statistics.main(
        ["--records", str(tmp_path), "--claims", str(file), "--out", str(tmp_path / "v")]
    )
    assert status == 2 and "claims: 201 are given; must be at most 200" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ the report


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return small_project(tmp_path_factory.mktemp("report"))


@pytest.fixture
def project(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "project")
    return tmp_path / "project"


FILES = {
    "verdicts": "verdicts.json",
    "records": "results/digits/gates.jsonl",
    "curves": "results/digits/gates.curves.jsonl",
    "environment": "results/environment/digits/gates.json",
    "readme": "replications/gates/README.md",
}


def _compared(**fields):
    return lambda d: d["papers"]["gates"]["claims"][0]["comparisons"][0].update(fields)


def _claimed(**fields):
    return lambda d: d["papers"]["gates"]["claims"][0].update(fields)


@pytest.mark.parametrize(
    ("file", "damage", "part"),
    [
        ("verdicts", '{"papers": 5}', "papers = 5"),
        ("verdicts", '{"papers": {"gates": []}}', "papers.gates = []: should be a valid dictionary"),
        ("verdicts", '{"papers": {"gates": {"claims": [{}]}}}', "claims[0].id: missing"),
        ("verdicts", '{"papers": {}, "alpha": "x"}', "alpha = 'x'"),
        ("verdicts", "[" * 100_000, "nested more than 50 deep"),
        ("verdicts", "null", "must be a table"),
        ("verdicts", _compared(verdict="perhaps"), "verdict = 'perhaps'"),
        ("verdicts", _compared(estimate="x"), "estimate = 'x'"),
        ("verdicts", _compared(values=[1e308]), "values[0] = 1e+308"),
        ("verdicts", _compared(values=[0.1]), "must have a value of each seed"),
        ("verdicts", _compared(treatment=None), "treatment"),
        ("verdicts", _compared(p=2), "p = 2"),
        ("verdicts", _claimed(deciding=7), "deciding = 7: must be one of its 1 comparisons"),
        ("verdicts", _claimed(comparisons=[]), "at least 1"),
        ("verdicts", _claimed(stability={"tried": 3}), "stability.held: missing"),
        ("environment", "[1]", "must be a table"),
        ("environment", '{"machine": [1]}', "machine = [1]"),
        ("environment", '{"machine": {"a": {"b": []}}}', "machine.a"),
        ("environment", '{"seconds": {"a": "abc"}}', "seconds.a = 'abc'"),
        ("environment", '{"unfinished": "many"}', "unfinished = 'many'"),
        ("curves", '{"settings_hash": "a", "curves": [1, "x"]}', "line 1.curves[0] = 1"),
        ("curves", '{"settings_hash": "a", "curves": [{"lr": {}}]}', "line 1.curves[0].lr"),
        ("readme", b"# \xe9\n", "README.md: not UTF-8 text"),
        ("readme", b"[" * 2**17 + b"\n", "README.md: cannot be read: larger than 0.125 MiB"),
    ],
)
def test_a_report_is_drawn_from_nothing_damaged(project, capsys, file, damage, part):
    path = project / FILES[file]
    if callable(damage):
        document = json.loads(path.read_text())
        damage(document)
        damage = json.dumps(document)
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert report.main(arguments(project)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in _one_line(error, path) and not (project / "report").exists()


@pytest.mark.parametrize("option", ["--results", "--replications"])
def test_a_folder_that_is_not_there_is_named(project, capsys, option):
    given = arguments(project)
    given[given.index(option) + 1] = str(project / "nope")
    assert report.main(given) == 2 and "nope: no such folder" in capsys.readouterr().err


def test_a_pipe_in_place_of_a_file_is_not_waited_for(project, capsys):
    (project / FILES["records"]).unlink()
    os.mkfifo(project / FILES["records"])
    assert report.main(arguments(project)) == 2 and "not an ordinary file" in capsys.readouterr().err


@pytest.mark.slow
def test_odd_names_and_settings_are_shown_as_they_are(project, capsys):
    path = project / FILES["records"]
    text = path.read_text().replace('"gated"', json.dumps("budget $10_{a$ it's <b> `x`"))
    rows = [
        json.loads(line) | {"settings": {"data": [1], "training": {"epochs": "x"}}}
        for line in text.splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main(arguments(project)) == 0, capsys.readouterr().err
    page = (project / "report" / "index.html").read_text()
    assert "budget $10_{a$" in page and "<b> `x`" not in page
    figure = next((project / "report" / "figures").glob("*target.svg")).read_text()
    assert "budget $10_{a$" in figure


# ------------------------------------------------------------------------------------------ many of them

PIECES = (
    b"",
    b"\\",
    b'"',
    b"9" * 50,
    b"[" * 60,
    b"null",
    b"-",
    b"e9",
    b"\n",
    b"{",
    b"\xff",
    b"\0",
    b"true",
    b"&a",
    b"*a",
)
CHANGES = {"params": 500, "claims": 300, "records": 300, "verdicts": 60, "curves": 60, "environment": 60}


def _loaded(path, project):
    """The settings, from a file that means the same to DVC; 2 with one line on stderr as of a command."""
    try:
        load("halo", path)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert repr(read_yaml(path)) == repr(parse_yaml(path.read_text(), "params.yaml"))
    return 0


def _judged(path, project):
    records, claims = project / "results" / "digits", project / "replications"
    out = ["--out", str(project / "v.json")]
    return statistics.main(["--records", str(records), "--claims", str(claims), *out])


def _drawn(path, project):
    return report.main(arguments(project))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("file", CHANGES)
def test_whatever_bytes_change_there_is_one_line_at_most(project, capsys, file):
    """Bytes of a file are changed, taken out and put in, again and again."""
    path = project / {**FILES, "claims": "replications/gates/claims.yaml", "params": "params.yaml"}[file]
    if file == "params":
        path.write_text(yaml.safe_dump(PARAMS))
    command = {"params": _loaded, "claims": _judged, "records": _judged}.get(file, _drawn)
    draw, whole = random.Random(file), path.read_bytes()
    for _ in range(CHANGES[file]):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 20))):
            at = draw.randrange(len(content))
            content[at : at + draw.choice((0, 1, 1, 9))] = draw.choice(
                (*PIECES, bytes([draw.randrange(256)]))
            )
        path.write_bytes(content)
        status, error = command(path, project), capsys.readouterr().err
        assert status in (0, 2) and len(error) < 2000, bytes(content)
        assert status == 0 or error.count("\n") == 1, bytes(content)
