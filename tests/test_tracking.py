"""MLflow: a real SQLite store and a real tracking server hold what the records hold."""

import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, ViewType
from project import ROOT, environment

from common.records import Entry
from common.report.runs import filters
from common.stage import logged, mlflow_runs, mlflow_store, publish, rows, tracking
from common.statistics.claims import read_all
from common.statistics.records import Records
from common.statistics.verdicts import judge

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "code": "c" * 64,
    "machine": {"device": "test", "cores": 2},
    "versions": {"torch": "0.0", "python": "3"},
}


def _entry(seed: int, status: str = "ok", epochs: int = 30, **more) -> Entry:
    record = {"paper": "example", "variant": "dense", "dataset": "digits", "architecture": "linear"}
    record |= {
        "device": "cpu",
        "precision": "bfloat16",
        "target": 0.5,
        "seed": seed,
        "status": status,
        "settings_hash": f"{seed:064d}",
        "data": ["d" * 64],
    }
    record |= {"settings": {"epochs": epochs, "optimiser": {"learning_rate": 0.1}}}
    record |= {
        "metrics": {"test_accuracy": 0.9 + seed / 1000, "note": None},
        "cost": {"macs": 640},
        "details": {},
    }
    if status == "failed":
        record |= {"reason": "the training loss is nan", "failure": "diverged", "metrics": {}, "cost": {}}
    rows = [{"phase": "train", "epoch": e, "lr": 0.1, "train_loss": 1 / (e + 1)} for e in range(epochs)]
    return Entry(record=record | more, curves=rows, seconds=1.5)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A store without runs, which takes seconds to make."""
    file = tmp_path_factory.mktemp("made") / "mlflow.db"
    mlflow_store._make(file)
    return file


@pytest.fixture
def store(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow_store, "_make", lambda file: shutil.copy(made, file))
    return tmp_path


def _log(*entries):
    """Log the entries as a stage does; returns how many were new."""
    with tracking.StageLog("example", "digits", ENVIRONMENT) as log:
        for entry in entries:
            log.add(entry)
    if log.error:
        raise log.error
    return log.added


def _runs(paper="example"):
    client = MlflowClient(tracking.store_uri())
    experiment = client.get_experiment_by_name(mlflow_runs.EXPERIMENT.format(paper=paper))
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return (
        client,
        [r for r in runs if "run_key" in r.data.tags],
        [r for r in runs if "run_key" not in r.data.tags],
    )


def test_a_stage_begins_without_loading_mlflow():
    code = "import sys, common.stage.tracking; sys.exit(bool({'mlflow', 'sqlalchemy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_store_holds_what_the_records_hold(store, monkeypatch):
    monkeypatch.setattr(mlflow_runs, "by_client", None)  # a local store does without
    entries = [_entry(0), _entry(1), _entry(2, "failed")]
    assert _log(*entries) == 3
    client, children, parents = _runs()
    assert len(children) == 3 and len(parents) == 1
    by_seed = {run.data.tags["seed"]: run for run in children}
    for entry in entries[:2]:
        record = entry.record
        run = by_seed[str(record.seed)]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["test_accuracy"] == record.metrics["test_accuracy"]
        assert run.data.metrics["cost.macs"] == 640 and run.data.metrics["seconds"] == 1.5
        assert run.data.params["optimiser.learning_rate"] == "0.1" and run.data.tags["variant"] == "dense"
        assert run.data.tags["settings_hash"] == record.settings_hash
        assert run.data.tags["device"] == "cpu" and run.data.tags["precision"] == "bfloat16"
        assert "failure" not in run.data.tags
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.inputs.dataset_inputs[0].dataset.name == "digits"
        curve = client.get_metric_history(run.info.run_id, "curve/train_loss")
        assert [(p.step, p.value) for p in sorted(curve, key=lambda p: p.step)] == [
            (e, 1 / (e + 1)) for e in range(30)
        ]
    lost = by_seed["2"]
    assert lost.info.status == "FAILED" and lost.data.tags["failure"] == "diverged"
    assert lost.data.tags["reason"] == "the training loss is nan"
    totals = {"runs": 3, "failed": 1, "seconds": 4.5}
    assert {name: parents[0].data.metrics[name] for name in totals} == totals
    assert (
        parents[0].data.tags["machine.device"] == "test" and parents[0].data.tags["versions.torch"] == "0.0"
    )


def test_a_repeated_stage_adds_what_is_missing_and_no_twins(store):
    _log(_entry(0))
    assert _log(_entry(0), _entry(1)) == 1
    assert _log(_entry(0), _entry(1)) == 0
    assert sorted(run.data.tags["seed"] for run in _runs()[1]) == ["0", "1"]


def test_long_curves_and_many_parameters_are_kept_whole(store):
    settings = {f"option{i}": i for i in range(250)} | {"long": "x" * 7000}
    _log(_entry(0, epochs=1500, settings=settings))
    client, (run,), _ = _runs()
    assert len(client.get_metric_history(run.info.run_id, "curve/train_loss")) == 1500
    assert run.data.params["option249"] == "249" and len(run.data.params["long"]) == 6000


def test_it_works_with_a_tracking_server(store, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{store}/server.db",
        "--artifacts-destination",
        str(store / "a"),
    ]
    # without the processes for jobs of its own, which are seven, and outlive a server that ends as they start
    quiet = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    server = subprocess.Popen(command, env=quiet, stdout=-3, stderr=-3, start_new_session=True)
    try:
        _await(f"http://127.0.0.1:{port}/health")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert _log(_entry(0), _entry(1)) == 2
        assert _log(_entry(0), _entry(1)) == 0
        assert len(_runs()[1]) == 2
        assert not (store / "mlflow.db").exists()
    finally:
        server.terminate()
        server.wait(20)
        mlflow.set_tracking_uri("")


def _await(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)


class _Killed(BaseException):
    pass


def _raises(error=RuntimeError, at=1):
    """Something that raises at its so manieth call, and goes on to what it stands for at all others."""

    def around(function):
        calls = []

        def called(*arguments, **more):
            calls.append(arguments)
            if at in (len(calls), "each"):
                raise error
            return function(*arguments, **more)

        return called

    return around


def _patch(monkeypatch, module, name, around):
    monkeypatch.setattr(module, name, around(getattr(module, name)))


def _by_client(monkeypatch):
    _patch(monkeypatch, rows, "write", _raises(at="each"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("way", ["at once", "by client"])
def test_a_stage_killed_while_logging_leaves_no_twin_and_no_stray_parent(store, monkeypatch, way):
    entries = [_entry(seed) for seed in range(3)]
    with monkeypatch.context() as patch:
        if way == "by client":
            _by_client(patch)
            _patch(patch, logged, "send", _raises(_Killed, at=2))  # in the middle of the second run
        else:
            _patch(patch, rows, "_name_input", _raises(_Killed, at=2))
        _log(*entries)
    _, children, others = _runs()
    assert len(children) == 1
    assert ["mlflow.parentRunId" in run.data.tags for run in others].count(True) == (way == "by client")
    assert _log(*entries) == 2
    _, children, parents = _runs()
    assert sorted(run.data.tags["seed"] for run in children) == ["0", "1", "2"]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}


def test_what_cannot_be_written_at_once_leaves_nothing_and_goes_by_the_client(store, monkeypatch):
    _patch(monkeypatch, rows, "_name_input", _raises(at=2))
    assert _log(*map(_entry, range(3))) == 3
    client, children, (parent,) = _runs()
    assert sorted(run.data.tags["seed"] for run in children) == ["0", "1", "2"]
    assert not client.search_runs([parent.info.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    with closing(sqlite3.connect("mlflow.db")) as made:
        for table in ("tags", "params", "metrics", "latest_metrics"):
            found = made.execute(f"SELECT count(DISTINCT run_uuid) FROM {table}").fetchone()
            assert found == (3 + (table != "params"),)
        assert made.execute("SELECT count(*) FROM inputs").fetchone() == (3,)


def test_what_the_store_refuses_costs_one_run_and_is_logged_next_time(store, monkeypatch):
    with monkeypatch.context() as patch:
        _by_client(patch)
        _patch(patch, logged, "send", _raises(ConnectionError("not now"), at=2))
        with tracking.StageLog("example", "digits", ENVIRONMENT) as log:
            for seed in range(3):
                log.add(_entry(seed))
    assert (log.added, log.missing, str(log.error)) == (2, 1, "not now")
    _, children, (parent,) = _runs()
    assert (
        sorted(run.data.tags["seed"] for run in children) == ["0", "2"] and parent.info.status == "FINISHED"
    )
    assert _log(*map(_entry, range(3))) == 1
    assert sorted(run.data.tags["seed"] for run in _runs()[1]) == ["0", "1", "2"]


_LONG = "n" * 249
_ODD_METRICS = {
    "test_accuracy": 0.5,
    "top@5": 0.9,
    "top_5": 0.8,
    "../x//y": 1.0,
    "..hidden": 3.0,
    f"{_LONG}/cut": 4.0,
    **{_LONG + "n" * more: float(more) for more in range(2, 6)},
    "huge": 10**400,
    "nan": math.nan,
}
_ODD_SETTINGS = {"learning rate @ start": 0.1, "note": "\ud800 'quoted' \0 %s :x", "none": None, "": ""}


def _varied() -> list[logged.Run]:
    """Runs of all kinds, and some that no entry leads to."""
    names, user = (
        logged.Names(),
        {"mlflow.user": "somebody", "odd @ tag": "\ud800" * 9000, "machine.cores": "2"},
    )
    entries = [_entry(0), _entry(1, "failed"), _entry(2, epochs=700), _entry(3, epochs=0, data=[])]
    entries += [
        _entry(4, data=["d" * 64, "e" * 64, "d" * 64]),
        _entry(5, dataset="o'ther", metrics=_ODD_METRICS, settings=_ODD_SETTINGS),
        _entry(6, settings={f"option{i}": i for i in range(250)} | {"long": "x" * 7000}),
        _entry(7).model_copy(update={"machine": {"cores": 3}, "ended": 1e9}),
    ]
    found = [
        logged.described(
            entry, "p" * 32, user if entry.record.seed else {}, f"key {entry.record.seed}", names
        )
        for entry in entries
    ]
    plain = found[0]
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, math.nan, 2.0, 1.0, 2.0, 0.0]
    points = [("m", value, moment, step) for moment in (8, 9) for step in (3, 1) for value in values]
    points += [("zero first", 0.0, 1, 0), ("zero first", math.nan, 1, 0)]
    points += [
        ("nan first", math.nan, 1, 0),
        ("nan first", 0.0, 1, 0),
        ("later", 9.0, 1, 0),
        ("later", 1.0, 2, 0),
    ]
    same, other = (
        Dataset(name, "d" * 32, "another", "source", "schema", "profile") for name in ("digits", "new")
    )
    tags = [InputTag("a", "1"), InputTag("b", "2")]
    return [
        *found,
        replace(plain, name="odd points", run_key="points", points=points),
        replace(plain, name="nothing", run_key="none", tags={}, params={}, points=[], inputs=[]),
        replace(plain, run_key="inputs", inputs=[DatasetInput(same, tags), *plain.inputs]),
        replace(plain, run_key="other", inputs=[DatasetInput(other, tags)]),
    ]


def _all_of(client: MlflowClient, experiment: str, ids: list[str]) -> dict[str, object]:
    """What a store tells of runs and all that stands in its tables, with names that say the same in every store."""
    called = {run_id: f"run {number}" for number, run_id in enumerate(ids)}
    with closing(sqlite3.connect(mlflow_store.own_file(client.tracking_uri))) as made:
        query = "SELECT dataset_uuid, name || ' ' || digest FROM datasets"
        called |= dict(made.execute(query))
        query = "SELECT input_uuid, source_id, destination_id FROM inputs"
        called |= {key: f"{called[data]} of {called[run]}" for key, data, run in made.execute(query)}
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN ('experiments', 'alembic_version')"
        tables = {name: made.execute(f"SELECT * FROM {name}").fetchall() for (name,) in made.execute(query)}

    def plain(value):
        text = repr(value)
        for key in called:
            text = text.replace(key, called[key])
        return text

    told = [client.get_run(run_id) for run_id in ids]
    assert {run.info.run_id for run in client.search_runs([experiment])} == set(ids)
    histories = [
        sorted(plain(dict(point)) for point in client.get_metric_history(run.info.run_id, name))
        for run in told
        for name in sorted(run.data.metrics)
    ]
    return {
        "runs": [plain(run.to_dictionary()) for run in told],
        "inputs": [sorted(plain(one.to_dictionary()) for one in run.inputs.dataset_inputs) for run in told],
        "histories": histories,
        **{name: sorted(map(plain, found)) for name, found in tables.items()},
    }


def test_a_run_written_at_once_is_what_the_client_leaves(tmp_path, made, monkeypatch):
    monkeypatch.setattr(logged, "time", SimpleNamespace(time=lambda: 2e9))
    runs, found = _varied(), []
    for number, way in enumerate((rows.write, logged.by_client)):
        file = tmp_path / f"{number}.db"
        shutil.copy(made, file)
        client = MlflowClient(f"sqlite:///{file}")
        experiment = client.create_experiment("some", "file:///some where/%41?x=1")
        found.append(_all_of(client, experiment, [way(client, experiment, run) for run in runs]))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert found[0][name] == found[1][name], name
    assert len(found[0]["datasets"]) == 4 and len(found[0]["metrics"]) > 1500


def test_names_that_the_store_refuses_are_changed_and_said_once(store, capsys):
    more = {"metrics": _ODD_METRICS, "settings": _ODD_SETTINGS}
    _log(_entry(0, **more), _entry(1, **more))
    for run in _runs()[1]:
        found = run.data.metrics
        assert (found["top_5_"], found["top_5"], found["x/y"], found["__hidden"]) == (0.9, 0.8, 1.0, 3.0)
        assert [found[_LONG + "n"], found[_LONG + "_"], found[_LONG[1:] + "__"]] == [2.0, 3.0, 4.0]
        assert run.data.params["learning rate _ start"] == "0.1" and "huge" not in found
    said = capsys.readouterr().err
    assert said.count("'top@5' is logged as 'top_5_'") == 1


def test_a_run_that_had_failed_is_replaced_when_it_passes(store):
    _log(_entry(0, "failed"), _entry(1))
    assert _log(_entry(0), _entry(1)) == 1
    assert [(run.data.tags["seed"], run.info.status) for run in _runs()[1]] == [
        ("0", "FINISHED"),
        ("1", "FINISHED"),
    ]


def test_an_experiment_that_was_deleted_is_restored(store, capsys):
    _log(_entry(0))
    client, _, (parent,) = _runs()
    client.delete_experiment(parent.info.experiment_id)
    assert _log(_entry(1)) == 1
    assert "pruning-replications/example is restored" in capsys.readouterr().err
    assert {run.data.tags["seed"] for run in _runs()[1]} >= {"1"}


def test_writers_at_once_leave_one_of_each_run(store):
    """Without a store at first, and each with the same runs."""
    writers = [tracking.StageLog("example", "digits", ENVIRONMENT) for _ in range(3)]
    with ExitStack() as all_of_them:
        for writer in writers:
            all_of_them.enter_context(writer)
        for seed in range(4):
            for writer in writers:
                writer.add(_entry(seed))
    assert [writer.error for writer in writers] == [None] * 3
    _, children, parents = _runs()
    assert sorted(run.data.tags["seed"] for run in children) == ["0", "1", "2", "3"]
    assert {run.info.status for run in parents} == {"FINISHED"}
    with closing(sqlite3.connect("mlflow.db")) as made:
        assert made.execute("SELECT count(*) FROM datasets").fetchone() == (1,)


@pytest.mark.parametrize("name", ["plain", "a#b%20c%d it's ü?x=1"])
def test_any_folder_has_its_store(store, tmp_path, monkeypatch, name):
    (tmp_path / name / ".dvc/tmp/exps/standalone/tmpabc").mkdir(parents=True)
    monkeypatch.chdir(
        tmp_path / name / ".dvc/tmp/exps/standalone/tmpabc"
    )  # where DVC executes what is queued
    assert _log(_entry(0)) == 1
    monkeypatch.chdir(tmp_path / name)
    assert _log(_entry(0), _entry(1)) == 1
    assert (
        not list((tmp_path / name / ".dvc").rglob("mlflow.db")) and (tmp_path / name / "mlflow.db").exists()
    )
    assert len(_runs()[1]) == 2


def test_a_store_that_is_locked_holds_nobody_up_and_is_logged_to_next_time(store, monkeypatch):
    _log(_entry(0))
    monkeypatch.setattr(mlflow_store, "PATIENCE", 0.1)
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with tracking.StageLog("example", "digits", ENVIRONMENT) as log:
            log.add(_entry(1))
        assert "locked" in str(log.error) and isinstance(log.error, mlflow_store.StoreError)
    assert _log(_entry(0), _entry(1)) == 1


@pytest.mark.parametrize("left", ["empty", "half made", "damaged"])
def test_a_store_that_a_kill_has_left_is_set_aside(store, monkeypatch, capsys, left):
    monkeypatch.setattr(mlflow_store, "_YOUNG", -1.0)
    if left == "half made":
        with closing(sqlite3.connect("mlflow.db")) as made:
            made.execute("CREATE TABLE runs (run_uuid TEXT)")
            made.execute("CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)")
    else:
        (store / "mlflow.db").write_bytes(b"no database " * 1000 if left == "damaged" else b"")
    before = (store / "mlflow.db").read_bytes()
    assert _log(_entry(0)) == 1
    assert f"mlflow.db was {left}" in capsys.readouterr().err
    assert (store / "mlflow.db.damaged-1").read_bytes() == before and len(_runs()[1]) == 1


@pytest.mark.parametrize("kind", ["text", "database"])
def test_a_file_of_something_else_is_left_where_it_is(store, monkeypatch, kind):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db?timeout=3")
    if kind == "database":
        with closing(sqlite3.connect("other.db")) as made:
            made.execute("CREATE TABLE addresses (name TEXT)")
    else:
        (store / "other.db").write_text("a letter\n" * 1000)
    before = (store / "other.db").read_bytes()
    with pytest.raises(
        mlflow_store.StoreError, match="other.db: (an SQLite file, but not|file is not a database)"
    ):
        _log(_entry(0))
    assert [file.name for file in store.iterdir()] == ["other.db"]
    assert (store / "other.db").read_bytes() == before


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_says_nothing_holds_nobody_up(store, monkeypatch, capsys, answers):
    """It takes what it is told and never answers, or answers without an end."""
    monkeypatch.setattr(tracking, "PATIENCE", 0.3)
    monkeypatch.setattr(publish, "PATIENCE", 0.3)
    (store / "page").touch()
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")

        def accept():
            with suppress(OSError):
                while True:
                    client = stack.enter_context(server.accept()[0])
                    if answers:
                        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")

        threading.Thread(target=accept, daemon=True).start()
        with tracking.StageLog("example", "digits", ENVIRONMENT) as log:
            log.add(_entry(0))
        assert str(log.error).endswith("does not answer")
        assert publish.main(["--profile", "digits", "page"]) == 0
        assert "does not answer" in capsys.readouterr().err


# ------------------------------------------------------------------------------ from a number to its runs and back


def test_settings_in_the_end_and_identity_are_params_and_times_are_those_of_training(store):
    details = {"chosen": {"xi": 0.0003, "psi": 0.006}}
    _log(
        _entry(3, details=details, settings={"epochs": 30, "strength": {"options": 5}}).model_copy(
            update={"ended": 1e9}
        )
    )
    _, (run,), (parent,) = _runs()
    params = run.data.params
    assert (params["variant"], params["dataset"], params["architecture"]) == ("dense", "digits", "linear")
    assert (params["target"], params["seed"]) == ("0.5", "3")
    assert (params["chosen.xi"], params["chosen.psi"]) == ("0.0003", "0.006")
    assert (params["trained.epochs"], params["trained.learning_rate"]) == ("30", "0.1")
    assert (run.info.start_time, run.info.end_time) == (1e12 - 1500, 1e12)
    assert (
        run.data.tags["mlflow.source.name"]
        == parent.data.tags["mlflow.source.name"]
        == "python -m replications run example"
    )
    assert run.data.tags["mlflow.user"]


def test_the_first_chart_of_a_stage_shows_accuracy_over_targets(store):
    half, tenth = {"target": 0.5, "settings_hash": "a"}, {"target": 0.9, "settings_hash": "b"}
    _log(_entry(0, **half), _entry(2, **(half | {"settings_hash": "c"})), _entry(0, **tenth))
    client, _, (parent,) = _runs()
    name = min(parent.data.metrics)
    assert name == "accuracy/digits linear/dense"
    history = client.get_metric_history(parent.info.run_id, name)
    assert {point.step: point.value for point in history} == {
        50: pytest.approx(0.901),
        90: pytest.approx(0.9),
    }


CLAIMS = """
paper: example
claims:
  - id: E 1
    statement: Sparse is better than dense.
    treatment: {variant: sparse}
    control: {variant: dense, target: 0.0}
    targets: [0.5]
    test: superiority
    direction: higher
  - id: E2
    statement: The advantage grows.
    treatment: {variant: sparse}
    test: trend
    direction: higher
    seen: 3
"""


@pytest.fixture
def claimed(store, monkeypatch):
    """A project whose paper `example` has claims, and runs of two variants at several targets, logged."""
    (store / "replications" / "example").mkdir(parents=True)
    (store / "replications" / "example" / "claims.yaml").write_text(CLAIMS)
    monkeypatch.setattr(mlflow_runs, "ROOT", store)
    runs = [("dense", 0.0, 0.9), ("sparse", 0.5, 0.95), ("sparse", 0.9, 0.6), ("other", 0.5, 0.7)]
    entries = [
        _entry(
            seed,
            epochs=2,
            variant=v,
            target=t,
            settings_hash=f"{v}{t}{seed}",
            metrics={"test_accuracy": a + seed / 1000},
        )
        for seed in range(7)
        for v, t, a in runs
    ]
    _log(*entries)
    return entries


def test_a_filter_of_the_page_finds_exactly_the_runs_behind_a_number(claimed, store):
    (file,) = read_all([store / "replications"])
    judged = judge([file], {"example": Records([entry.record for entry in claimed])})
    client, _, _ = _runs()
    experiment = client.get_experiment_by_name("pruning-replications/example").experiment_id

    def found(comparison):
        sides = [
            client.search_runs([experiment], one, max_results=1000) for one in filters(comparison, "digits")
        ]
        return [
            {(r.data.params["variant"], r.data.params["target"], int(r.data.params["seed"])) for r in s}
            for s in sides
        ]

    first, second = judged["papers"]["example"]["claims"]
    (comparison,) = first["comparisons"]
    assert found(comparison) == [
        {("sparse", "0.5", s) for s in range(7)},
        {("dense", "0", s) for s in range(7)},
    ]
    (trend,) = second["comparisons"]
    assert found(trend) == [{("sparse", t, s) for s in range(4, 7)} for t in ("0.5", "0.9")]
    assert filters(comparison, "another") and not client.search_runs(
        [experiment], filters(comparison, "another")[0]
    )


def test_a_run_leads_back_to_the_claims_that_read_it(claimed, store):
    client, children, (parent,) = _runs()
    notes = {
        (r.data.params["variant"], r.data.params["target"], r.data.params["seed"]): r.data.tags[
            "mlflow.note.content"
        ]
        for r in children
    }
    page = (store / "reports" / "digits" / "index.html").as_uri()
    assert f"[E 1]({page}#example-e-1): Sparse is better than dense." in notes["sparse", "0.5", "0"]
    assert "E2" not in notes["sparse", "0.5", "3"] and "E2" in notes["sparse", "0.5", "4"]
    assert "E 1" not in notes["sparse", "0.9", "0"] and "E 1" in notes["dense", "0", "0"]
    assert "Evidence" not in notes["other", "0.5", "0"]
    experiment = client.get_experiment(parent.info.experiment_id)
    assert f"{page}#example" in experiment.tags["mlflow.note.content"]
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["claims.yaml"]


def test_report_and_verdicts_hang_on_the_run_of_the_stage(claimed, store, monkeypatch, capsys):
    monkeypatch.setattr(publish, "papers", lambda: ["example", "never run"])
    (store / "whole.html").write_text("a page")
    (store / "verdicts.json").write_text("{}")
    assert publish.main(["--profile", "digits", "whole.html", "verdicts.json"]) == 0
    client, _, (parent,) = _runs()
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names == {"claims.yaml", "verdicts.json", "whole.html"}
    assert "published with the runs of example\n" in capsys.readouterr().out
    assert publish.main(["--profile", "another", "whole.html"]) == 0
    assert "no stage" in capsys.readouterr().out

    def unreachable(*_):
        raise ConnectionError("no store")

    monkeypatch.setattr(publish, "publish", unreachable)
    assert publish.main(["--profile", "digits", "whole.html"]) == 0
    assert "publishing in MLflow failed" in capsys.readouterr().err
