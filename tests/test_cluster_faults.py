"""What goes wrong under a cluster of Ray: what ends a command in one line, what it goes on through, and what nobody loses."""

import errno
import math
import socket
import subprocess
import threading
import time

import pytest
import yaml
from cluster_nodes import ELSEWHERE, Nodes, own_view
from made_up_jobs import made_up
from project import only_example, params, start

from common import commandline
from common.settings import ExecutionSettings
from common.stage import cluster, node
from common.stage.connection import said, watch
from common.stage.depot import Refused
from common.stage.store import Store, TimeBudget
from common.stage.worker import NO_NETWORKS, Task

PATIENCE = 300
"""Seconds for what takes some on a machine that is free."""


def test_what_listens_no_longer_is_lost_and_what_closes_a_connection_is_not():
    server = socket.create_server(("127.0.0.1", 0))
    place, lost, ended = server.getsockname(), threading.Event(), threading.Event()
    said = []
    watch([place], lambda name: (said.append(name), lost.set()), ended)
    for _ in range(2):
        server.accept()[0].close()  # which a server may do with a line on which nothing is said
    line, _ = server.accept()
    assert not lost.is_set()
    server.close()
    line.close()
    assert lost.wait(20) and said == [f"127.0.0.1:{place[1]}"]


def test_a_watch_that_has_ended_says_nothing():
    server = socket.create_server(("127.0.0.1", 0))
    said, ended = [], threading.Event()
    watch([server.getsockname()], said.append, ended)
    line, _ = server.accept()
    ended.set()
    server.close()
    line.close()
    time.sleep(0.1)
    assert said == []


def test_a_full_disk_of_a_node_is_told_with_its_name_and_one_of_the_command_without(monkeypatch):
    def fails(error):
        def executed(*_):
            raise error

        monkeypatch.setattr(node, "_executed", executed)
        with pytest.raises(OSError) as raised:
            node.execute(None, None, {})
        return raised.value

    full = fails(OSError(errno.ENOSPC, "No space left on device", ".runs/a.json"))
    assert full.filename == f".runs/a.json on node {node.platform.node()}" and full.errno == errno.ENOSPC
    assert fails(Refused(errno.ENOSPC, "full", "/home/a.json")).filename == "/home/a.json"


def test_what_a_node_could_not_prepare_is_one_line_with_its_address():
    told = "Failed to set up runtime environment.\n[Node 10.0.0.1] Traceback (most recent call last):\n  File x\nOSError: full\n"
    assert said(Exception(told)) == "node 10.0.0.1: OSError: full"
    assert said(Exception("the first\n the second")) == "the first"


class Ray:
    """In place of Ray: a node with a CPU, which may be lost, and tasks that never end."""

    alive = True

    def nodes(self):
        about = {"NodeID": "1", "NodeManagerHostname": "a", "NodeManagerAddress": "10.0.0.1"}
        return [{**about, "Resources": {"CPU": 1.0}, "Alive": self.alive}]

    def remote(self, *what):
        return self if len(what) == 1 else object()

    def options(self, **_):
        return self

    def put(self, what):
        return what

    def wait(self, pending, **_):
        time.sleep(0.01)
        return [], pending

    def shutdown(self):
        pass


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine of such a cluster; given: gives it a task whose budget ends then. lose: as its watch calls it."""
    monkeypatch.setattr(cluster, "_KNOWN", 0.01)
    monkeypatch.setattr(cluster, "connected", lambda *_: Ray())
    monkeypatch.setattr(cluster.Cluster, "_blind", lambda self: [])
    monkeypatch.setattr(cluster.Cluster, "_heard", lambda self: [])
    monkeypatch.setattr(cluster, "watch", lambda _, lost, ended: setattr(Ray, "lose", lost))
    monkeypatch.setattr(commandline._Leave, "at_once", False)
    run, settings = made_up("dense", 0), ExecutionSettings(engine="ray", device="cpu")
    store = Store(tmp_path, settings)
    found = cluster.Cluster(settings, store, [run])
    found.given = lambda ends=math.inf: found.submit(
        Task(run, store, settings, False, TimeBudget(ends), NO_NETWORKS), False
    )
    found.places = lambda: list(tmp_path.rglob("*.place"))
    yield found
    found.close()


def test_without_a_node_a_command_says_so_and_waits_for_as_long_as_its_time(engine, capsys):
    waits = engine.given()
    engine._ray.alive = False
    assert engine.given(time.time()).result(20) is None
    assert not waits.done() and engine.room == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no node that can take a run is left: waiting for one to join")


def test_when_the_head_node_is_gone_all_that_is_given_out_ends_and_nothing_more_is(engine):
    waits = engine.given()
    assert [file.read_bytes() for file in engine.places()] == [b""]
    engine._ray.lose("head:6379")
    assert isinstance(waits.exception(1), OSError) and waits.exception().filename == "head:6379"
    with pytest.raises(OSError, match="gone"):
        engine.given()
    engine.close(at_once=True)
    assert commandline._Leave.at_once  # Ray would end the process with a status of its own


# ------------------------------------------------------------------------------------------- a cluster


@pytest.fixture
def nodes():
    pytest.importorskip("ray", reason="Ray is not installed: `make cluster` adds it")
    if own_view() is None:
        pytest.skip("no node can be started that does not see a folder: `unshare` is not allowed here")
    found = Nodes(cpus=0)
    only_example(found.home)
    yield found
    found.close()


def _command(nodes, **execution):
    """Start the command that trains the example, whose runs take a second at least."""
    file = params(nodes.folder, example={"seconds": 1.0, "seeds": {"first": 0, "count": 3}})
    settings = yaml.safe_load(file.read_text())
    del (profile := settings["profiles"]["digits"])["execution"]["workers"]
    profile["execution"] |= execution or {"engine": "ray", "address": nodes.address}
    file.write_text(yaml.safe_dump(settings))
    return start(nodes.folder, "python", "-m", "replications", "run", "example", PYTHONPATH=str(nodes.folder))


def _ended(process):
    """The exit status of a command and the last line that it has written."""
    _, messages = process.communicate(timeout=PATIENCE)
    return process.returncode, messages.replace("\r", "\n").strip().splitlines()[-1]


def _reached(nodes, count):
    """Wait until so many runs are finished."""
    folder, deadline = nodes.folder / ".runs/digits/example", time.monotonic() + PATIENCE
    while len(list(folder.glob("*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _records(nodes):
    return (nodes.folder / "results/digits/example.jsonl").read_bytes()


@pytest.mark.long
def test_nodes_that_fill_up_or_are_lost_and_a_head_node_that_is_lost_cost_no_run(nodes):
    alone = _command(nodes, engine="local")
    assert _ended(alone)[0] == 0
    expected = _records(nodes)
    subprocess.run(["rm", "-r", nodes.folder / ".runs", nodes.folder / "results"], check=True)

    elsewhere = (*own_view(), *ELSEWHERE, str(nodes.folder))
    small = ("sh", "-c", 'mount -t tmpfs -o size=64m none "$0" && exec "$@"', f"{nodes.home}/r")
    first = nodes.join(*elsewhere, *small)
    command = _command(nodes)
    _reached(nodes, 1)
    fill = f"dd if=/dev/zero of={nodes.home}/r/fill bs=64k"
    subprocess.run(["nsenter", "-m", "-t", str(first.pid), *fill.split()], capture_output=True)
    status, line = _ended(command)
    assert status == 2 and " on node " in line and "No space left on device" in line, line
    assert "the same command goes on from there" in line
    nodes.lose(first)

    second = nodes.join(*elsewhere)
    command = _command(nodes)
    _reached(nodes, 2)
    nodes.lose(second)  # and there is no other
    time.sleep(3.0)
    assert command.poll() is None
    nodes.join(*elsewhere)
    _reached(nodes, 4)
    nodes.lose_head()
    status, line = _ended(command)
    assert status == 2 and nodes.address.rpartition(":")[2] in line and "is gone; " in line, line
    nodes.end()

    assert _ended(_command(nodes, engine="local"))[0] == 0
    assert _records(nodes) == expected
