"""Trainings of all papers end with the weights, masks and structures of revision 510c674; see lockstep."""

import lockstep
import numpy as np
import pytest

TOLERANCE = 1e-12
NAMES = [(paper, case) for paper in lockstep.PAPERS for case in lockstep.cases(paper)]


@pytest.mark.parametrize(("paper", "case"), NAMES, ids=["/".join(name) for name in NAMES])
def test_a_training_ends_as_it_did(paper, case):
    expected, found = lockstep.frozen(paper)[case], lockstep.arrays(lockstep.cases(paper)[case]())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.dtype.kind == "f":
            assert found[name].dtype == np.float64, name
            assert np.abs(found[name] - value).max(initial=0) <= TOLERANCE, name
        else:
            assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("paper", lockstep.PAPERS)
def test_every_frozen_training_is_still_a_case(paper):
    assert lockstep.frozen(paper).keys() == lockstep.cases(paper).keys()
