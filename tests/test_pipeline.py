"""The pipeline, run by the real `dvc repro` in a temporary copy of the project."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from project import add_example, copy, environment, params, run

from common.core import networks
from common.stage.papers import papers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy in which the only paper is the example: a folder and a stage, no other file changed."""
    project = copy(tmp_path_factory.mktemp("pipeline"))
    for paper in papers():
        _remove(project, paper)
    add_example(project)
    params(project, keep="headline")
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        assert run(project, *command).returncode == 0
    return project


@pytest.fixture(scope="module")
def project(fresh):
    """The same after `dvc repro`; a test that changes it runs that again."""
    _repro(fresh)
    return fresh


def _remove(project, paper):
    """Removing a paper is deleting its folder and its stage (and the one that draws its corpus)."""
    shutil.rmtree(project / "replications" / paper)
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())
    del pipeline["stages"][paper]
    if paper == "pretraining_impact":
        del pipeline["stages"]["glyphs"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))


def _repro(project):
    result = run(project, "dvc", "repro")
    assert result.returncode == 0, result.stdout + result.stderr
    return [line.split("'")[1] for line in result.stdout.splitlines() if line.startswith("Running stage")]


def test_a_sixth_paper_runs_to_its_verdict(fresh):
    assert set(_repro(fresh)) == {"settings", "data", "example", "statistics", "report", "publish"}
    verdicts = json.loads((fresh / "reports/digits/verdicts.json").read_text())
    (claim,) = verdicts["papers"]["example"]["claims"]
    assert claim["id"] == "E1" and claim["verdict"] in ("replicated", "open")
    page = (fresh / "reports/digits/index.html").read_text()
    assert "Zeroing nine tenths" in page and claim["verdict"] in page
    assert list((fresh / "reports/digits/figures").glob("*.svg"))
    assert "Zeroing nine tenths" in (fresh / "reports/index.html").read_text()


def test_a_paper_may_join_after_the_others_have_run(project):
    add_example(project, "seventh")
    ran = _repro(project)
    _remove(project, "seventh")
    _repro(project)
    assert set(ran) == {"settings", "seventh", "statistics", "report", "publish"}


def test_nothing_runs_again_without_a_change(project):
    assert _repro(project) == []


def test_a_change_runs_only_what_follows_from_it(project):
    claims = project / "replications/example/claims.yaml"
    claims.write_text(claims.read_text().replace("costs accuracy.", "costs some accuracy."))
    kept = {file: file.stat().st_mtime_ns for file in (project / ".runs/digits/example").glob("*.json")}
    assert _repro(project) == ["settings", "example", "statistics", "report", "publish"]
    # the stage has asked what the claims need, and trained nothing
    assert kept == {
        file: file.stat().st_mtime_ns for file in (project / ".runs/digits/example").glob("*.json")
    }
    scheduler = project / "common/stage/scheduler.py"
    scheduler.write_text(scheduler.read_text() + "\n# changed\n")
    assert _repro(project) == []
    template = next((project / "common/report/templates").glob("*.css"))
    template.write_text(template.read_text() + "\n/* changed */\n")
    assert _repro(project) == ["report", "publish"]
    protocol = project / "replications/example/protocol.py"
    protocol.write_text(protocol.read_text() + "\n# changed\n")
    assert _repro(project)[:2] == ["settings", "example"]


@pytest.mark.long
def test_a_killed_pipeline_goes_on_with_the_same_command(project):
    results = project / "results/digits/example.jsonl"
    expected = results.read_bytes()
    protocol = project / "replications/example/protocol.py"
    protocol.write_text(protocol.read_text() + "\n# changed again\n")
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=project, env=environment(), stdout=-3, stderr=-3, start_new_session=True
    )
    before = set((project / ".runs/digits/example").glob("*.json"))
    deadline = time.monotonic() + 120
    while len(set((project / ".runs/digits/example").glob("*.json")) - before) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "example" in _repro(project)
    assert results.read_bytes() == expected


def test_metrics_and_plots_are_there_for_dvc(project):
    shown = run(project, "dvc", "metrics", "show", "--json")
    assert shown.returncode == 0
    ((values,),) = ([one["data"] for one in json.loads(shown.stdout)[""]["data"].values()],)
    assert values["headlines"]["open"] + values["headlines"]["replicated"] == 1
    assert set(values) == {"headlines", "example"} and set(values["example"]) == {"E1"}
    assert run(project, "dvc", "plots", "show", "-o", "plots-page").returncode == 0
    assert (project / "plots-page/index.html").exists()


def test_the_report_follows_a_checkout(project):
    page = project / "reports/digits/index.html"
    before = page.read_bytes()
    page.unlink()
    shutil.rmtree(project / "reports/digits/figures")
    assert run(project, "dvc", "checkout").returncode == 0
    assert page.read_bytes() == before and list((project / "reports/digits/figures").glob("*.svg"))


def test_the_store_of_the_copy_holds_its_runs(project):
    code = (
        "import mlflow; c = mlflow.MlflowClient('sqlite:///mlflow.db');"
        "e = c.get_experiment_by_name('pruning-replications/example');"
        "print(len({r.data.tags['run_key'] for r in c.search_runs([e.experiment_id]) if 'run_key' in r.data.tags}))"
    )
    found = run(project, "python", "-c", code)
    assert int(found.stdout) >= len((project / "results/digits/example.jsonl").read_text().splitlines())


def test_networks_of_headline_runs_are_in_the_store_and_what_they_take_on_the_page(project, tmp_path):
    records = [
        json.loads(line) for line in (project / "results/digits/example.jsonl").read_text().splitlines()
    ]
    kept = {record["settings_hash"] for record in records}  # the claim is a headline, and compares all
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'pruning-replications/example'")
    runs = {run.data.tags.get("settings_hash"): run for run in client.search_runs([experiment.experiment_id])}
    environment = json.loads((project / "results/environment/digits/example.json").read_text())
    takes, found = environment["measured"], {}
    for name in kept:
        (artifact,) = client.list_artifacts(runs[name].info.run_id, "network")
        file = Path(client.download_artifacts(runs[name].info.run_id, artifact.path, str(tmp_path)))
        found[name], about = networks.unpacked(file.read_bytes())
        assert file.suffix == ".safetensors" and about["settings_hash"] == name
        # those of the first seed are measured, beside and not in the records; a run that was done again took other times
        measured = {f"measured.{key}": value for key, value in takes.get(name, {}).items()}
        logged = {key: v for key, v in runs[name].data.metrics.items() if key.startswith("measured.")}
        assert logged == pytest.approx(
            {key: value if "bytes" in key else logged[key] for key, value in measured.items()}
        )
    assert set(takes) == {record["settings_hash"] for record in records if record["seed"] == 0}
    assert all(one["milliseconds"] > 0 and one["bytes"] == one["dense_bytes"] > 0 for one in takes.values())
    assert "milliseconds" not in (project / "results/digits/example.jsonl").read_text()
    for record in records:
        weights = sum(int(p.count_nonzero()) for p in found[record["settings_hash"]].parameters())
        assert weights == record["cost"]["nonzero_parameters"]
    page = (project / "reports/digits/index.html").read_text()
    first = next(takes[record["settings_hash"]] for record in records if record["variant"] == "pruned")
    assert f"{first['milliseconds']:.3g} ms, " in page and f"{first['bytes']:,.0f}" in page


def test_wrong_settings_stop_the_pipeline_with_one_clear_line(project):
    file = project / "params.yaml"
    good = file.read_text()
    file.write_text(good.replace("source: digits", "source: digit"))
    result = run(project, "dvc", "repro")
    file.write_text(good)
    assert result.returncode != 0
    assert "params.yaml: profiles.digits.dataset.source = 'digit'" in result.stderr
