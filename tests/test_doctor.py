"""What kills leave of files of DVC and MLflow is found, said and repaired; what is whole is left alone."""

import fcntl
import json
import subprocess
import sys

import pytest

from common.stage import doctor, mlflow_store
from common.stage.doctor import main

WHOLE = "schema: '2.0'\nstages:\n  one:\n    cmd: echo\n    outs:\n    - path: x\n      md5: abc\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_store, "_YOUNG", -1.0)
    monkeypatch.setattr(doctor, "_PATIENCE", 0.2)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / "dvc.lock").write_text(WHOLE)
    return tmp_path


def _commit(project):
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "dvc.lock"), (*who, "commit", "-qm", "start")):
        subprocess.run(["git", *command], cwd=project, check=True)


def test_what_is_whole_is_left_alone(project, capsys):
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "dvc"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as dvc:
        dvc.stdout.readline()
        running = {"write": {"x": {"pid": dvc.pid, "cmd": "dvc repro"}}, "read": {}}
        (project / ".dvc/tmp/rwlock").write_text(json.dumps(running))
        assert main() == 0 and "nothing to repair" in capsys.readouterr().out
        dvc.kill()
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == running
    assert (project / "dvc.lock").read_text() == WHOLE
    for file in ("dvc.lock", ".dvc/tmp/rwlock"):
        (project / file).unlink()
    assert main() == 0 and "nothing to repair" in capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 5, 20, 30, 42, 60, len(WHOLE) - 1])
@pytest.mark.parametrize("committed", [True, False])
def test_a_lock_file_that_is_cut_short_is_put_back_or_removed(project, capsys, length, committed):
    if committed:
        _commit(project)
    (project / "dvc.lock").write_text(WHOLE[:length])
    assert main() == 0
    said = capsys.readouterr().out
    assert "dvc.lock was " in said and ("as last committed" if committed else "removed") in said
    assert (project / "dvc.lock").exists() == committed
    assert not committed or (project / "dvc.lock").read_text() == WHOLE
    assert main() == 0 and "nothing to repair" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", '{"write": {"a": 1}}', '{"write": [], "read": {}}', "[]", "null"])
def test_a_lock_table_that_is_damaged_is_removed(project, capsys, text):
    (project / ".dvc/tmp/rwlock").write_text(text)
    assert main() == 0 and "rwlock was cut short: it is removed" in capsys.readouterr().out
    assert not (project / ".dvc/tmp/rwlock").exists()


def test_commands_that_were_killed_are_taken_out_of_the_lock_table(project, capsys):
    dead = {"pid": 2**22 + 1, "cmd": "dvc repro"}
    other = {"pid": 1, "cmd": "dvc repro"}  # the number is another program's now
    (project / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {"a": dead}, "read": {"b": [other, dead]}}))
    assert main() == 0 and "named commands that were killed" in capsys.readouterr().out
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == {"write": {}, "read": {}}


def test_nothing_is_touched_while_dvc_is_at_work(project, capsys):
    (project / "dvc.lock").write_text("")
    with (project / ".dvc/tmp/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main() == 2
    assert "held by a DVC command" in capsys.readouterr().err and (project / "dvc.lock").read_text() == ""


def test_a_folder_in_which_dvc_cannot_work_is_named(project, capsys, monkeypatch):
    (project / "{a}").mkdir()
    monkeypatch.chdir(project / "{a}")
    assert main() == 2 and "{a}: DVC cannot work" in capsys.readouterr().err


def test_a_store_of_mlflow_that_is_half_made_is_set_aside(project, capsys):
    (project / "mlflow.db").write_bytes(b"")
    assert main() == 0 and "mlflow.db was empty: it is now mlflow.db.damaged-1" in capsys.readouterr().out
    assert not (project / "mlflow.db").exists() and (project / "mlflow.db.damaged-1").exists()
