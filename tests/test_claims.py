"""The claims file and the command that judges: what is wrong is named, what is right gives verdicts."""

import hashlib
import json
import subprocess
import sys

import pytest
import yaml

from common.settings import ROOT, SettingsError
from common.statistics import claims
from common.statistics.__main__ import main

GOOD = {
    "id": "H1",
    "statement": "New beats old.",
    "treatment": {"variant": "new"},
    "control": {"variant": "old"},
    "test": "superiority",
    "direction": "higher",
}
LEAVE_OUT = object()


def claims_file(folder, *entries, paper="demo", **top):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "claims.yaml"
    file.write_text(yaml.safe_dump({"paper": paper, "claims": list(entries)} | top))
    return file


def changed(**fields):
    return {key: value for key, value in (GOOD | fields).items() if value is not LEAVE_OUT}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"metrics": "x"}, ["H1.metrics: unknown key", "did you mean 'metric'?"]),
        (
            {"treatment": {"varaint": "new"}},
            ["H1.treatment.varaint: unknown key", "allowed: variant, architecture", "'variant'"],
        ),
        (
            {"control": [{"variant": "old"}, {"targte": 1}]},
            ["H1.control[1].targte", "did you mean 'target'?"],
        ),
        ({"control": {"minus": {"metrik": "a"}}}, ["H1.control.minus.metrik", "did you mean 'metric'?"]),
        ({"where": {"data": "digits"}}, ["H1.where.data: unknown key; allowed: dataset, architecture"]),
        ({"paper_value": {"value": 2, "unit": "points"}}, ["H1.paper_value.source: missing"]),
        (
            {"paper_value": {"value": 2, "unit": "points", "sorce": "a"}},
            ["paper_value.sorce", "did you mean 'source'?"],
        ),
        ({"test": "superior"}, ["H1.test = 'superior'", "'superiority'", "'noninferiority'"]),
        ({"direction": "up"}, ["H1.direction = 'up'", "'higher'"]),
        ({"statement": LEAVE_OUT}, ["H1.statement: missing"]),
        ({"id": LEAVE_OUT}, ["claim number 1.id: missing"]),
        ({"treatment": LEAVE_OUT}, ["H1.treatment: missing"]),
        ({"treatment": {}}, ["H1.treatment.variant: missing"]),
        ({"treatment": "new"}, ["H1.treatment = 'new'", "table of variant"]),
        ({"treatment": []}, ["H1.treatment", "at least 1"]),
        ({"control": LEAVE_OUT}, ["H1.control: missing; test superiority needs it"]),
        ({"control": {"variant": "new"}}, ["H1.control: the same as the treatment"]),
        ({"control": {}}, ["H1.control: the same as the treatment"]),
        ({"direction": LEAVE_OUT}, ["H1.direction: missing"]),
        ({"test": "equivalence", "direction": LEAVE_OUT}, ["H1.matters: missing; test equivalence needs it"]),
        (
            {"test": "equivalence", "margin": 0.1},
            ["H1.direction: not for test equivalence, which knows control, margin"],
        ),
        ({"test": "threshold"}, ["H1.value: missing"]),
        ({"value": 0.5}, ["H1.value: not for test superiority"]),
        ({"steps": [{"variant": "a"}, {"variant": "b"}]}, ["H1.steps: not for test superiority"]),
        ({"margin": 0}, ["H1.margin", "greater than 0"]),
        ({"bounds": [1, 0]}, ["H1.bounds = [1, 0]", "below the cap"]),
        ({"margin": {"digits": "wide"}}, ["H1.margin.digits = 'wide'", "number"]),
        ({"margin": float("nan")}, ["H1.margin", "finite"]),
        ({"matters": -0.1}, ["H1.matters", "greater than or equal to 0"]),
        ({"matters": 0.1, "margin": 0.1}, ["H1.margin: not beside matters"]),
        (
            {"test": "noninferiority", "matters": {"digits": 0.1, "other": 0}},
            ["H1.matters = 0: test noninferiority needs more than 0"],
        ),
        ({"role": "main"}, ["H1.role = 'main'", "'headline'", "'probe'"]),
        ({"precondition": {"variant": "a"}}, ["H1.precondition.not_worse_than: missing"]),
        (
            {"precondition": {"variant": "a", "not worse then": "b"}},
            ["H1.precondition.not_worse_then: unknown key", "did you mean 'not_worse_than'?"],
        ),
        ({"targets": [-1]}, ["H1.targets", "= -1", "greater than or equal to 0"]),
        ({"targets": 0.9}, ["H1.targets", "0.9", "tuple"]),
        (
            {"targets": [0.9], "treatment": {"variant": "new", "target": 0.9}},
            ["H1.targets: the treatment fixes its target"],
        ),
        (
            {"treatment": [{"variant": "a"}, {"variant": "b"}], "control": [{"variant": c} for c in "cde"]},
            ["3 controls for 2 treatments"],
        ),
        ({"control": {"minus": {"minus": {"target": 0.1}}}}, ["`minus` inside a `minus`"]),
        (
            {"test": "threshold", "value": -1, "scale": "ratio"},
            ["H1.value = -1: a ratio is compared with a positive number"],
        ),
        ({"test": "trend", "scale": "ratio"}, ["H1.scale = 'ratio'"]),
        (
            {"test": "trend", "treatment": {"variant": "new", "target": 0.5}},
            ["H1.treatment.target: a trend runs over targets"],
        ),
        (
            {"test": "trend", "x": "logit", "steps": [{"variant": "a"}, {"variant": "b"}]},
            ["H1.x: not together with steps"],
        ),
        (
            {"test": "trend", "steps": [{"variant": "a", "x": 1}, {"variant": "b", "x": 1}]},
            ["two steps have the same x"],
        ),
        ({"test": "trend", "steps": [{"variant": "a"}]}, ["H1.steps", "at least 2"]),
        (
            {"test": "diversity", "control": {"variant": "old", "minus": {"target": 0}}},
            ["vectors are not subtracted"],
        ),
        ({"role": "headline"}, ["H1.source: missing; a headline needs it"]),
        ({"role": "headline", "source": "abstract"}, ["H1.matters_from: missing"]),
        ({"role": "supporting", "deviation": "ties"}, ["H1.deviation: only of a probe"]),
    ],
)
def test_a_wrong_claim_is_named_with_file_claim_and_field(tmp_path, fields, parts):
    file = claims_file(tmp_path, changed(**fields))
    with pytest.raises(SettingsError) as error:
        claims.read(file)
    message = str(error.value)
    assert message.startswith(f"{file}: claim ") and "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("paper: [", ["line 2", "not valid YAML"]),
        ("", ["must be a table with the keys paper, seen, claims, arithmetic"]),
        ("paper: demo", ["claims = None: must be a list of claims"]),
        ("claims: [{id: A}]", ["paper = None"]),
        ("paper: demo\nclaims: []", ["claims = []"]),
        ("paper: demo\nclaim: []", ["claim: unknown key", "did you mean 'claims'?"]),
        ("paper: demo\nseen: first\nclaims: [all good]", ["seen = 'first': must be the highest seed"]),
        ("paper: demo\nclaims: [all good]", ["claim number 1 = 'all good': must be a table"]),
        ("paper: demo\npaper: demo", ["'paper' is given twice"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, parts):
    file = tmp_path / "claims.yaml"
    file.write_text(content + "\n")
    with pytest.raises(SettingsError) as error:
        claims.read(file)
    for part in [str(file), *parts]:
        assert part in str(error.value)


def test_numbers_that_settings_fix_are_read_and_have_ids_of_their_own(tmp_path):
    entry = {"id": "cost", "statement": "scoring takes so much", "variant": "new", "metric": "scoring_cost"}
    file = tmp_path / "claims.yaml"
    whole = {"paper": "demo", "seen": 15, "claims": [GOOD, {**GOOD, "id": "later", "seen": 20}]}
    file.write_text(yaml.safe_dump({**whole, "arithmetic": [entry]}))
    found = claims.read(file)
    assert [one.metric for one in found.arithmetic] == ["scoring_cost"]
    assert [claim.seen for claim in found.claims] == [15, 20]
    for wrong, message in ((GOOD["id"], "arithmetic H1: another entry"), ("later", "arithmetic later")):
        file.write_text(yaml.safe_dump({**whole, "arithmetic": [{**entry, "id": wrong}]}))
        with pytest.raises(SettingsError, match=message):
            claims.read(file)


def test_two_claims_of_one_id_and_two_files_of_one_paper_are_errors(tmp_path):
    with pytest.raises(SettingsError, match="claim H1: two claims have this id"):
        claims.read(claims_file(tmp_path / "a", GOOD, GOOD))
    first, second = claims_file(tmp_path / "b", GOOD), claims_file(tmp_path / "c", GOOD)
    with pytest.raises(SettingsError) as error:
        claims.read_all([first, second])
    assert str(error.value) == f"{second}: paper 'demo' has claims in {first} already"
    assert len(claims.read_all([first, first.parent, first])) == 1


def test_every_form_of_a_claim_is_read(tmp_path):
    entries = [
        changed(id="a", margin={"digits": 0.01, "other": 0.005}, targets={"digits": [0.98]}, require="any"),
        changed(
            id="b",
            test="difference",
            direction=LEAVE_OUT,
            where={"dataset": "digits", "architecture": ["x", "y"]},
        ),
        changed(id="c", test="threshold", control=LEAVE_OUT, value=0.2, scale="ratio", direction="lower"),
        changed(
            id="d",
            test="trend",
            treatment={},
            control=LEAVE_OUT,
            steps=[{"variant": "a", "x": 2}, {"variant": "b", "x": 9}],
        ),
        changed(id="e", paper_value={"value": 2, "unit": "points", "source": "abstract"}, note="as read"),
        changed(
            id="f",
            treatment={"variant": "new", "minus": {"target": 0}},
            control={"variant": "old", "minus": {"target": 0}},
        ),
    ]
    entries += [
        changed(
            id="g",
            role="headline",
            source="abstract",
            matters_from="a reader's need",
            matters={"digits": 0, "other": 0.01},
            bounds=[None, 1],
            meant_to_fail="old",
            precondition=[
                {"variant": "a", "not worse than": "b", "by": 0.02},
                {"variant": "b", "not_worse_than": "c"},
            ],
        )
    ]
    a, b, c, d, e, f, g = claims.read(claims_file(tmp_path, *entries)).claims
    assert (g.role, f.role, g.matters_for("digits"), g.matters_for("cifar10")) == (
        "headline",
        "supporting",
        0,
        0.01,
    )
    assert g.bounds == (None, 1) and g.meant_to_fail == ("old",)
    assert [(p.variant, p.not_worse_than, p.by) for p in g.precondition] == [
        ("a", "b", 0.02),
        ("b", "c", None),
    ]
    assert (a.matters_for("digits"), a.matters_for("cifar10"), a.targets_for("digits")) == (
        0.01,
        0.005,
        (0.98,),
    )
    assert a.covers("digits", "mlp") and not a.covers("cifar10", "mlp")
    assert b.covers("digits", "x") and not b.covers("digits", "z") and not b.covers("cifar10", "x")
    assert (
        c.control is None
        and d.steps[1].x == 9
        and e.paper_value.source == "abstract"
        and f.control[0].minus.target == 0
    )


# -------------------------------------------------------------------------------------------- the command


def record(variant, seed, accuracy, **fields):
    place = {
        "paper": "demo",
        "variant": variant,
        "dataset": "digits",
        "architecture": "mlp",
        "target": 0.9,
        "seed": seed,
    }
    return (
        place
        | {"status": "ok", "metrics": {"test_accuracy": accuracy}, "cost": {}, "settings_hash": "0" * 64}
        | fields
    )


RECORDS = [
    record(*run) for s in range(8) for run in (("new", s, 0.9 + s / 1000), ("old", s, 0.8 + s * s / 1000))
]


def records_file(folder, records=None, name="demo.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("".join(json.dumps(entry) + "\n" for entry in (RECORDS if records is None else records)))
    return file


def command(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command_judges_files_and_folders_alike(tmp_path, capsys):
    headline = {"role": "headline", "source": "abstract", "matters_from": "a reader's need"}
    claims_of_demo = claims_file(tmp_path / "replications/demo", GOOD | headline)
    file = records_file(tmp_path / "results")
    (tmp_path / "results/demo.curves.jsonl").write_text('{"settings_hash": "a", "curves": []}\n')
    out, metrics, other = (tmp_path / name for name in ("new/verdicts.json", "metrics.json", "other.json"))
    assert command("--records", file, "--claims", claims_of_demo, "--out", out, "--metrics", metrics) == 0
    assert "1 replicated" in capsys.readouterr().out
    assert (
        command("--records", tmp_path / "results", "--claims", tmp_path / "replications", "--out", other) == 0
    )
    assert out.read_bytes() == other.read_bytes()
    document = json.loads(out.read_text())
    assert document["alpha"] == 0.05 and document["counts"]["replicated"] == 1
    paper = document["papers"]["demo"]
    assert paper["claims_digest"] == hashlib.sha256(claims_of_demo.read_bytes()).hexdigest()
    (claim,) = paper["claims"]
    assert claim["verdict"] == "replicated" and claim["statement"] == GOOD["statement"]
    short = json.loads(metrics.read_text())
    assert short["headlines"] == {"replicated": 1, "contradicted": 0, "open": 0, "not_tested": 0}
    assert short["demo"]["H1"] == pytest.approx(claim["comparisons"][0]["estimate"], rel=1e-3)


def test_floats_are_written_with_ten_digits_and_nothing_that_is_not_a_number(tmp_path):
    out = tmp_path / "verdicts.json"
    two = [record("new", s, 0.9 + s / 300) for s in range(2)] + [record("old", s, 0.8) for s in range(2)]
    assert (
        command(
            "--records", records_file(tmp_path, two), "--claims", claims_file(tmp_path, GOOD), "--out", out
        )
        == 0
    )
    (comparison,) = json.loads(out.read_text())["papers"]["demo"]["claims"][0]["comparisons"]
    assert comparison["estimate"] == 0.1016666667
    assert comparison["effect_size"] is None  # undefined for two seeds


def test_papers_without_claims_are_noted_and_claims_without_records_not_tested(tmp_path, capsys):
    files = (
        records_file(tmp_path),
        records_file(tmp_path, [record("new", 0, 0.9) | {"paper": "another"}], "b.jsonl"),
    )
    out = tmp_path / "verdicts.json"
    absent = claims_file(tmp_path / "absent", GOOD, paper="absent")
    assert command("--records", *files, "--claims", absent, "--out", out) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"note: no claims for paper {paper!r}: its records are ignored" for paper in ("another", "demo")
    ]
    (claim,) = json.loads(out.read_text())["papers"]["absent"]["claims"]
    assert claim["verdict"] == "not tested" and claim["reason"] == "not tested: no run of new"


def test_the_same_record_twice_counts_once_and_another_of_the_same_run_is_an_error(tmp_path, capsys):
    first, copy = records_file(tmp_path / "a"), records_file(tmp_path / "b")
    demo, out = claims_file(tmp_path, GOOD), tmp_path / "verdicts.json"
    assert command("--records", first, copy, "--claims", demo, "--out", out) == 0
    assert json.loads(out.read_text())["papers"]["demo"]["claims"][0]["comparisons"][0]["n"] == 8
    other = records_file(tmp_path / "c", [record("new", 3, 0.1)])
    assert command("--records", first, other, "--claims", demo, "--out", out) == 2
    assert f"{other}, line 1: another record of the run in {first}, line 7" in capsys.readouterr().err
    # whatever of a record is read, so that the order of files never matters
    same = json.loads(first.read_text().splitlines()[6])
    for name, value in {"chance": 0.3, "device": "cuda", "settings": {"epochs": 3}}.items():
        other = records_file(tmp_path / name, [same | {name: value}])
        assert command("--records", first, other, "--claims", demo, "--out", out) == 2
        assert f"in {first}, line 7, with another {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"paper": "demo", "vari', ["line 3", "not valid JSON (half written?)"]),
        ("[1, 2]", ["line 3", "must be a table"]),
        ('{"paper": "demo"}', ["line 3.variant: missing", "line 3.status: missing"]),
        (json.dumps(record("new", 0, 0.9, status="done")), ["line 3.status = 'done'", "'ok' or 'failed'"]),
        (json.dumps(record("new", "first", 0.9)), ["line 3.seed = 'first'"]),
        (
            json.dumps(record("new", 0, 0.9, target=float("nan"))),
            ["line 3.target = None"],
        ),
        (json.dumps(record("new", 0, 0.9, metrics=[1])), ["line 3.metrics = [1]"]),
    ],
)
def test_a_damaged_record_is_named_with_file_and_line(tmp_path, capsys, text, parts):
    file = records_file(tmp_path, RECORDS[:1])
    file.write_text(file.read_text() + "\n" + text + "\n")
    out = tmp_path / "verdicts.json"
    assert command("--records", file, "--claims", claims_file(tmp_path, GOOD), "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in [f"error: {file}, ", *parts]:
        assert part in line
    assert not out.exists()


def test_files_that_cannot_be_used_are_one_clear_line(tmp_path, capsys):
    demo, file, out = (
        claims_file(tmp_path / "demo", GOOD),
        records_file(tmp_path / "results"),
        tmp_path / "v.json",
    )
    (tmp_path / "empty").mkdir()
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    blocked = file / "verdicts.json"  # below a file, where no folder can be
    for records, of, to, part in [
        (tmp_path / "none.jsonl", demo, out, "none.jsonl: cannot be read: No such file"),
        (tmp_path / "empty", demo, out, "empty: no records (*.jsonl) in this folder"),
        (binary, demo, out, "binary.jsonl: not UTF-8 text"),
        (file, tmp_path / "none.yaml", out, "none.yaml: cannot be read"),
        (file, tmp_path / "empty", out, "empty: no claims.yaml in this folder"),
        (file, demo, blocked, str(file)),
    ]:
        assert command("--records", records, "--claims", of, "--out", to) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and part in line


def test_an_empty_records_file_is_no_error(tmp_path):
    out = tmp_path / "v.json"
    assert (
        command(
            "--records", records_file(tmp_path, []), "--claims", claims_file(tmp_path, GOOD), "--out", out
        )
        == 0
    )
    assert json.loads(out.read_text())["counts"]["not tested"] == 1


@pytest.mark.slow
def test_statistics_never_loads_torch():
    code = "import sys, common.statistics.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
