"""Records and claims as revision 510c674 left them can still be judged; the verdicts are those of today's rules.

Records: of the cifar10-cpu profile, all runs that a comparison reads. Left out are long details that no claim reads
(events, densities, curves), and the settings of all seeds but the first, which differ in nothing. Claims: all files of
that revision, unchanged. Verdicts: those that it gave, of which only the claims' names are compared.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, environment

FROZEN = Path(__file__).parent / "records_510c674"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The finished command, and what it wrote."""
    out = tmp_path_factory.mktemp("frozen") / "verdicts.json"
    files = ["--records", FROZEN / "records", "--claims", FROZEN / "claims", "--out", out]
    command = [sys.executable, "-m", "common.statistics", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    return done, json.loads(out.read_text()) if out.exists() else None


def _by_claim(verdicts):
    return {name: {c["id"]: c for c in paper["claims"]} for name, paper in verdicts["papers"].items()}


@pytest.mark.slow
def test_records_and_claims_of_510c674_are_judged(judged):
    done, verdicts = judged
    expected = json.loads((FROZEN / "verdicts.json").read_text())
    assert done.returncode == 0, done.stderr
    assert {paper: set(found) for paper, found in _by_claim(verdicts).items()} == {
        paper: set(claims) for paper, claims in expected.items()
    }
