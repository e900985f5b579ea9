"""`pytest -m soak`: kills over `make repro` of a small profile at any moment, files of DVC and MLflow among the targets.

Every episode ends by the same command, with the bytes of an undisturbed one, and MLflow holds each run once. SOAK_KILLS and
SOAK_SEED in the environment choose others.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from project import ROOT, add_example, copy, environment, params, run

pytestmark = [pytest.mark.slow, pytest.mark.soak]

KILLS = int(os.environ.get("SOAK_KILLS", 100))
SEED = int(os.environ.get("SOAK_SEED", 0))
FILES = [f"results/digits/example.{name}" for name in ("jsonl", "curves.jsonl", "predictions.npz")]
FILES += [f"reports/digits/{name}" for name in ("verdicts.json", "metrics.json")]
WATCHED = {
    "time": (),
    "lock": ("dvc.lock",),
    "lock table": (".dvc/tmp/rwlock",),
    "store": ("mlflow.db", "mlflow.db-journal", "mlflow.db.*.tmp*"),
    "run": (".runs/digits/example/*.json",),
    "results": ("results/digits/*", "results/partial/digits/*"),
    "report": ("reports/digits/*",),
}
LONGEST = 240.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A project with one small paper, committed."""
    project = copy(tmp_path_factory.mktemp("soak"))
    for protocol in (project / "replications").glob("*/protocol.py"):
        shutil.rmtree(protocol.parent)
    stages = (project / "dvc.yaml").read_text().split("\n\n")
    papers = (
        "pretraining_impact",
        "halo",
        "feature_relevance",
        "imp_slr",
        "pruning_from_scratch",
        "equal_footing",
    )
    kept = [one for one in stages if one.strip().partition(":")[0] not in (*papers, "glyphs")]
    (project / "dvc.yaml").write_text("\n\n".join(kept))
    add_example(project)
    params(project, example={"seeds": [0, 1, 2, 3, 4], "targets": [0.5, 0.9], "seconds": 0.2})
    shutil.copy(ROOT / "Makefile", project)
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "start")):
        assert run(project, "git", *command).returncode == 0
    return project


def _start(project):
    command = ["make", f"BIN={Path(sys.executable).parent}", "-o", "setup", "repro"]
    return subprocess.Popen(
        command,
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _state(project, patterns):
    found = (file for pattern in patterns for file in project.glob(pattern))
    state = []
    for file in found:
        try:
            about = file.stat()
        except FileNotFoundError:
            continue
        state.append((file.name, about.st_mtime_ns, about.st_size))
    return sorted(state)


def _killed(project, chance):
    """Start the command and kill all of it, some time after it is begun or some milliseconds after a file has changed."""
    target = chance.choice(list(WATCHED))
    changes, delay = chance.randint(1, 4), chance.uniform(0, 0.03)
    process = _start(project)
    ends = time.monotonic() + (chance.uniform(0, 25) if target == "time" else LONGEST)
    before = _state(project, WATCHED[target])
    while process.poll() is None and time.monotonic() < ends and changes:
        if (now := _state(project, WATCHED[target])) != before:
            before, changes = now, changes - 1
        time.sleep(0.001)
    time.sleep(delay)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0].decode(errors="replace")
    assert alive or process.returncode == 0, said
    return target, alive


def _whole(project):
    """Run the command to its end, and return what it leaves."""
    process = _start(project)
    said = process.communicate()[0].decode(errors="replace")
    assert process.returncode == 0, said
    assert "Traceback" not in said, said
    return [(project / name).read_bytes() for name in FILES]


def _logged(project):
    """MLflow's runs that are not deleted: status and key."""
    text = (
        "SELECT status, (SELECT value FROM tags WHERE tags.run_uuid = runs.run_uuid AND key = 'run_key') "
        "FROM runs WHERE lifecycle_stage = 'active'"
    )
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        return store.execute(text).fetchall()


def test_kills_at_any_moment_change_no_byte_and_no_run_is_lost_or_logged_twice(base, tmp_path):
    chance, kills, counts, episode = random.Random(SEED), 0, {}, 0
    expected = _whole(shutil.copytree(base, tmp_path / "undisturbed", symlinks=True))
    runs = len(expected[0].splitlines())
    while kills < KILLS:
        episode += 1
        project = shutil.copytree(base, tmp_path / f"episode-{episode}", symlinks=True)
        for _ in range(chance.randint(5, 10)):
            target, alive = _killed(project, chance)
            kills += alive
            counts[target] = counts.get(target, 0) + alive
        assert _whole(project) == expected, (episode, counts)
        logged = _logged(project)
        keys = [key for _, key in logged if key]
        assert len(keys) == len(set(keys)) == runs, (episode, counts, logged)
        assert {status for status, _ in logged} == {"FINISHED"}, (episode, counts, logged)
        assert not list(project.rglob("*.lease-*"))
        shutil.rmtree(project)
    print(json.dumps({"kills": kills, "episodes": episode, **counts}))
