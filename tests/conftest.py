"""Options and defaults of the test suite."""

import gc
import os
from pathlib import Path

import pytest

# before torch is imported anywhere: spinning OpenMP threads are slow beside other busy processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def pytest_addoption(parser):
    parser.addoption(
        "--vectors",
        action="append",
        type=Path,
        help="file or folder of golden vectors to run in place of tests/golden (may be repeated)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """A test that is not marked slow is fast, so that `-m fast` and `-m slow` are the whole suite, but for the soak, which runs
    only where it is asked for."""
    if "soak" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("soak") is None]
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


def pytest_ignore_collect(collection_path, config):
    """With `-m fast`, files all of whose tests are slow are not imported, nor what they alone import."""
    if config.option.markexpr == "fast" and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() or None
    return None


def pytest_collection_finish():
    """What is imported by now stays: nobody looks for garbage in it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what is left at the end of Python is reported by some packages


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """The folder of the made-up papers with their report, for all who only read it."""
    from reporting import arguments, make

    from common.report import command

    folder = tmp_path_factory.mktemp("reported")
    make(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "WORKERS", 1)  # other processes take longer to start than this to draw
        assert command.main(arguments(folder)) == 0
    return folder
