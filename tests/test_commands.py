"""Every command can be stopped from its first moment on, with one line."""

import os
import signal
import subprocess
import sys

import pytest
from project import ROOT, copy, environment

COMMANDS = (
    "replications",
    "replications.selected",
    "replications.pretraining_impact.glyphs",
    "common.report",
    "common.stage.data",
    "common.stage.prepare",
    "common.stage.publish",
    "common.stage.resolve",
    "common.statistics",
)
# stands for packages that take long to load
_SLOW = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name in ("numpy", "pydantic", "torch", "yaml"):
            print(name, flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Variables with which Python never ends loading the first package that is not its own."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(_SLOW)
    return environment(PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_still_loading_stops_with_one_line(slow, command):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 3), (signal.SIGUSR1, 3)):
        process = subprocess.Popen(
            [sys.executable, "-m", command], env=slow, cwd=ROOT, stdout=-1, stderr=-1, text=True
        )
        assert process.stdout.readline().strip() in ("numpy", "pydantic", "torch", "yaml")
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == status, said
        assert said.startswith("stopped: ") and said.count("\n") == 1


def _limited(limit, *command, project=ROOT, **extra):
    """What a command says under a limit of the shell, and its exit status."""
    line = f"ulimit {limit}; exec {sys.executable} -m {' '.join(command)}"
    found = subprocess.run(
        ["sh", "-c", line], cwd=project, env=environment(**extra), capture_output=True, text=True, timeout=60
    )
    return found.returncode, found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
@pytest.mark.parametrize(
    ("limit", "command", "said"),
    [
        ("-v 150000", "common.statistics", "146 MiB of memory may be addressed (ulimit -v), 256 are needed"),
        ("-n 16", "replications run halo", "worker processes: 16 files may be open at once (ulimit -n), 24"),
    ],
)
def test_a_limit_that_is_too_low_is_one_line(tmp_path, limit, command, said):
    project = copy(tmp_path)  # where nothing is trained yet
    status, error = _limited(limit, *command.split(), project=project)
    assert status == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_package_that_cannot_be_loaded_is_one_line(tmp_path, command):
    cannot = "raise ImportError('more\\nlines') from ImportError('libx.so: failed to map segment')"
    (tmp_path / "sitecustomize.py").write_text(
        _SLOW.replace("print(name, flush=True)", cannot).replace("time.sleep(60)", "pass")
    )
    status, error = _limited("-c 0", command, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (status, error) == (2, "error: libx.so: failed to map segment\n")


def test_a_command_ends_with_what_was_to_be_done_at_its_end():
    code = """
import atexit, threading, time
from common import commandline

def main():
    atexit.register(print, "at its end")
    threading.Thread(target=lambda: (time.sleep(0.3), print("waited for")), daemon=DAEMON).start()
    print("done")
    return 4

commandline.run(main)
"""
    for daemon, expected in ((False, "done\nwaited for\nat its end\n"), (True, "done\nat its end\n")):
        command = [sys.executable, "-c", code.replace("DAEMON", str(daemon))]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (found.returncode, found.stdout, found.stderr) == (4, expected, "")


def test_no_command_of_the_suite_is_left_out():
    commands = set()
    for file in (*ROOT.glob("common/**/*.py"), *ROOT.glob("replications/**/*.py")):
        if "commandline.run(" in file.read_text():
            commands.add(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    assert commands - {"common.commandline"} == set(COMMANDS)
