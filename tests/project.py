"""A temporary copy of the project with the example paper in it, to run real stages and pipelines in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import warm
import yaml

ROOT = Path(__file__).resolve().parent.parent
_COPIED = (
    "common",
    "replications",
    ".dvc/config",
    ".dvc/plots",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "params.yaml",
    "pyproject.toml",
)


def copy(folder: Path) -> Path:
    """Copy the project's code and settings into `folder`/project."""
    project = folder / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in _COPIED:
        source, target = ROOT / name, project / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    return project


def add_example(project: Path, name: str = "example") -> None:
    """Add the example paper: a folder and a stage, nothing else."""
    example = ROOT / "tests" / "example_paper"
    target = project / "replications" / name
    shutil.copytree(example, target, ignore=shutil.ignore_patterns("__pycache__", "stage.yaml"))
    for file in (target / "claims.yaml", target / "protocol.py"):
        file.write_text(file.read_text().replace("example", name))
    pipeline = project / "dvc.yaml"
    stage = (example / "stage.yaml").read_text().replace("example", name)
    pipeline.write_text(pipeline.read_text().replace("stages:\n", f"stages:\n{stage}\n", 1))


def params(project: Path, profile: str = "digits", **more: object) -> Path:
    """Write a params.yaml with one small profile, and what more it is to say."""
    data = {"source": "digits", "train": 200, "validation": 100}
    block = {
        "dataset": data,
        "execution": {
            "device": "cpu",
            "precision": "float32",
            "compilation": "auto",
            "deterministic": True,
            "threads": 1,
            "workers": 2,
        },
        **more,
    }
    file = project / "params.yaml"
    file.write_text(yaml.safe_dump({"profile": profile, "profiles": {profile: block}}))
    return file


def environment(**extra: str) -> dict[str, str]:
    """Variables for a process of the copied project: its own code first, one thread, no telemetry."""
    quiet = {"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    places = [str(Path(executable).parent) for executable in (warm.python(), sys.executable)]
    path = os.pathsep.join([*places, os.environ["PATH"]])
    clean = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "PYTHONPATH")}
    return {**clean, **quiet, "PATH": path, **extra}


def start(project: Path, *command: str, **extra: str) -> subprocess.Popen[str]:
    """Start a command of the project's Python environment in the copy; its process group has its number."""
    if command[0] == "python":
        command = (warm.python(), *command[1:])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment(**extra), start_new_session=True, **streams)


def run(project: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run such a command to its end."""
    process = start(project, *command, **extra)
    texts = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *texts)


BARE = "import sys\nsys.modules['mlflow'] = sys.modules['dvc'] = None\n"
"""As `sitecustomize.py`, makes a machine with neither MLflow nor DVC."""


def only_example(folder: Path) -> Path:
    """A copy on such a machine, in which the only paper is the example, with its own defaults."""
    project = copy(folder)
    for protocol in (project / "replications").glob("*/protocol.py"):
        shutil.rmtree(protocol.parent)
    add_example(project)
    params(project)
    (project / "sitecustomize.py").write_text(BARE)
    return project


def replications(project: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a command of `python -m replications` in such a copy."""
    return run(project, "python", "-m", "replications", *command, PYTHONPATH=str(project))
