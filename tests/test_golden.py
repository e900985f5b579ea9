"""Golden vectors: every case of every file runs through the project's own implementation.

`pytest tests/test_golden.py --vectors FILE_OR_FOLDER` runs other files of the same format. The code behind a case is
found by the file's `slug` (module tests/golden_kinds/<slug>.py) and the case's `kind` (an entry of its KINDS).
"""

import importlib.util
import json
import math
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GENERAL = {"abs", "rel", "exact", "integers"}
# searches on the deepest networks
SLOW = {"search_resnet110_p40", "search_resnet56_p50", "search_resnet50_p50", "search_mobilenet_v1_p50"}


def pytest_generate_tests(metafunc):
    sources = metafunc.config.getoption("--vectors") or [HERE / "golden"]
    cases = [entry for source in sources for file in _files(source) for entry in _cases(file)]
    metafunc.parametrize(
        ("document", "case"),
        [pytest.param(d, c, marks=[pytest.mark.slow] * (c["name"] in SLOW)) for d, c in cases],
        ids=[f"{d['slug']}/{c['name']}" for d, c in cases],
    )


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise pytest.UsageError(f"--vectors {source}: no such file or folder")
    files = [source] if source.is_file() else sorted(source.glob("*.json"))
    if not files:
        raise pytest.UsageError(f"--vectors {source}: no .json files in this folder")
    return files


def _cases(file: Path) -> list[tuple[dict, dict]]:
    document = json.loads(file.read_text(encoding="utf-8"))
    if "slug" not in document or "cases" not in document:
        raise pytest.UsageError(f"{file}: not a file of golden vectors (no slug or no cases)")
    return [(document, case) for case in document["cases"]]


def _module(slug: str):
    path = HERE / "golden_kinds" / f"{slug}.py"
    if not path.exists():
        pytest.fail(f"no implementation is registered for slug {slug!r} ({path.name} is missing)")
    spec = importlib.util.spec_from_file_location(f"golden_kinds_{slug}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_case(document, case):
    module = _module(document["slug"])
    kind = case["kind"]
    if kind not in module.KINDS:
        if case.get("optional"):
            pytest.skip(f"optional: {case['optional']}")
        pytest.fail(f"unknown kind {kind!r} of {document['slug']}")
    got = module.KINDS[kind](case, document)
    check = getattr(module, "CHECKS", {}).get(kind)
    if check:
        check(case, document, got)
    else:
        assert_close(got, case["expected"], case["tolerance"])


def assert_close(got, expected, tolerance):
    """`got` holds everything in `expected`, each number within the case's tolerance."""
    if not isinstance(tolerance, dict):
        tolerance = {"exact": True} if tolerance == "exact" else {"abs": tolerance}
    _compare(got, expected, tolerance, "")


def _compare(got, expected, tolerance, where):
    if isinstance(expected, dict):
        assert isinstance(got, dict), f"{where}: {type(got).__name__} in place of a table"
        for key, value in expected.items():
            assert key in got, f"{where}.{key} is missing"
            _compare(got[key], value, _for_field(tolerance, key), f"{where}.{key}")
    elif isinstance(expected, list):
        got = list(got)
        assert len(got) == len(expected), f"{where}: {len(got)} items, expected {len(expected)}"
        for index, (one, other) in enumerate(zip(got, expected)):
            _compare(one, other, tolerance, f"{where}[{index}]")
    elif isinstance(expected, bool) or not isinstance(expected, (int, float)):
        missing = expected is None and (got is None or (isinstance(got, float) and math.isnan(got)))
        assert missing or got == expected, f"{where}: {got!r}, expected {expected!r}"
    else:
        assert _number_matches(float(got), expected, tolerance), f"{where}: {got!r}, expected {expected!r}"


def _for_field(tolerance: dict, key: str) -> dict:
    special = {
        k.removeprefix(f"{key}_"): v for k, v in tolerance.items() if k in (f"{key}_abs", f"{key}_rel")
    }
    if special:
        return special
    if key in tolerance and key not in GENERAL:
        return {"exact": True} if tolerance[key] == "exact" else {"abs": tolerance[key]}
    return tolerance


def _number_matches(got: float, expected: float, tolerance: dict) -> bool:
    if isinstance(expected, int) and tolerance.get("integers") == "exact":
        return got == expected
    return abs(got - expected) <= tolerance.get("abs", 0) + tolerance.get("rel", 0) * abs(expected)
