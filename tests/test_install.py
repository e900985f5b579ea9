"""The one way to install the project is editable, from a clone."""

import os
import shutil
import subprocess
import sys

import pytest
from project import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    clone = tmp_path_factory.mktemp("clone")
    for name in (".ci", "common", "replications"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    return clone


def _pip(clone, *arguments):
    command = [sys.executable, "-m", "pip", "--no-input", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=clone, env=clean, capture_output=True, text=True, check=False)


def test_an_editable_install_finds_the_clone(clone, tmp_path):
    # what pip needs (setuptools) comes from this environment, what it installs goes to a folder
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--editable", ".")
    result = _pip(clone, "install", "--target", str(tmp_path), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    code = f"import site; site.addsitedir({str(tmp_path)!r}); import common; print(common.__file__)"
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == str(clone / "common/__init__.py"), found.stderr


@pytest.mark.parametrize("command", [("wheel", "--wheel-dir", "built"), ("install", "--target", "there")])
def test_a_package_is_refused_in_one_line(clone, command):
    result = _pip(clone, *command, "--no-deps", "--no-index", "--no-build-isolation", ".")
    assert result.returncode != 0
    lines = (result.stdout + result.stderr).splitlines()
    (said,) = {line.strip() for line in lines if "is not built as a package" in line}
    assert "clone its repository and run `pip install --editable .`" in said
    assert not any("Traceback" in line for line in lines)
    assert not list((clone / "built").glob("*")) and not (clone / "there").exists()
