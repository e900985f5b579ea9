"""Learning-rate lists: lengths, end points, warm-up."""

import pytest

from common.core import schedules

EVERY = [
    lambda **o: schedules.constant(0.1, 6, 5, **o),
    lambda **o: schedules.multistep(0.1, 6, 5, [3, 4.5], **o),
    lambda **o: schedules.step(0.1, 6, 5, 2, **o),
    lambda **o: schedules.exponential(0.1, 6, 5, 0.9, **o),
    lambda **o: schedules.linear(0.1, 6, 5, **o),
    lambda **o: schedules.cosine(0.1, 6, 5, **o),
]


@pytest.mark.parametrize("make", EVERY)
def test_one_rate_per_iteration_and_none_above_the_highest(make):
    for warmup in (0, 1):
        rates = make(warmup_epochs=warmup)
        assert len(rates) == 30
        assert max(rates) == pytest.approx(0.1)
        assert min(rates) >= 0


@pytest.mark.parametrize("make", EVERY)
def test_a_warmup_rises_evenly_from_zero_to_the_highest_rate(make):
    rates = make(warmup_epochs=1)
    assert rates[:6] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])


def test_multistep_may_drop_in_the_middle_of_an_epoch():
    rates = schedules.multistep(1.0, 6, 4, [3, 4.5], 0.1)
    assert rates.index(pytest.approx(0.1)) == 12
    assert rates.index(pytest.approx(0.01)) == 18


def test_linear_and_cosine_would_reach_their_end_one_iteration_after_the_last():
    assert schedules.linear(1.0, 5, 2)[-1] == pytest.approx(0.1)
    assert schedules.linear(1.0, 5, 2, end=0.5)[-1] == pytest.approx(0.55)
    assert schedules.cosine(1.0, 5, 2, end=0.5)[5] == pytest.approx(0.75)


def test_a_warmup_may_fill_training_but_not_exceed_it():
    assert len(schedules.cosine(0.1, 2, 5, warmup_epochs=2)) == 10
    for make in EVERY:
        with pytest.raises(ValueError, match="warm-up of 7 epochs"):
            make(warmup_epochs=7)
