"""A real cluster of Ray on this machine, whose nodes see different file systems, for tests."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
from project import ROOT

STARTS = 3
"""A busy machine may take longer than Ray waits."""
ELSEWHERE = ("sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')
"""Starts a command, in a view of its own, that sees nothing in the folder that follows."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def own_view():
    """How to start a command that has its own view of the file system; None where that is not allowed."""
    for options in (("-m",), ("-r", "-m")):
        command = ["unshare", *options]
        if shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return None


class Nodes:
    """A cluster, which has a head node at first. folder: the project's. cpus: of the head node."""

    def __init__(self, cpus=1):
        self.home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short names
        self.folder = self.home / "project"
        self.folder.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        head = (
            "--head",
            f"--port={self.address.partition(':')[2]}",
            f"--temp-dir={self.home}/r",
            "--no-monitor",
        )
        self._start((), cpus, *head, "--include-dashboard=false", "--disable-usage-stats")

    def join(self, *before, cpus=1):
        """Start a further node, by a command that starts another one; returns its process."""
        known = self._raylets()
        self._start(before, cpus, f"--address={self.address}")
        (found,) = self._raylets() - known
        return found

    def _start(self, before, cpus, *options):
        variables = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "RAY_enable_worker_prestart": "0"}
        variables["RAY_worker_niceness"] = "0"  # of 15, nothing is left on a busy machine
        ray = (
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            f"--num-cpus={cpus}",
            "--include-log-monitor=false",
        )
        for left in reversed(range(STARTS)):
            command = [*before, *ray, "--object-store-memory=80000000", *options]
            found = subprocess.run(command, env=variables, capture_output=True, text=True)
            if not found.returncode:
                return
            assert left, found.stdout + found.stderr
            if "--head" in options:
                self.end()

    def _raylets(self):
        return {process for process in self._processes() if "raylet/raylet" in process.cmdline()[0]}

    def _processes(self):
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(
                f"{self.home}/r" in part or self.address in part for part in process.info["cmdline"] or ()
            ):
                found.append(process)
        return found

    def lose(self, node):
        """Kill a node, with all that it has started."""
        self._kill([node])

    def lose_head(self):
        """Kill the head node's processes, and what they have started, and leave the others alone."""
        parts = [(each, " ".join(each.info["cmdline"])) for each in self._processes()]
        self._kill(
            each
            for each, said in parts
            if "gcs_server" in said or "raylet/raylet" in said and "--head" in said
        )

    def end(self):
        """Kill all nodes."""
        self._kill(process for process in self._processes() if process.pid != os.getpid())

    @staticmethod
    def _kill(processes):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                started = process.children(recursive=True)
                for each in (process, *started):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()

    def close(self):
        self.end()
        shutil.rmtree(self.home, ignore_errors=True)
