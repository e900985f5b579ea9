"""Which runs the next looks need, on made-up records."""

from collections import Counter

from made_up import claim, dense, pair, record, runs, sample

from common.statistics.buying import wanted
from common.statistics.claims import ClaimsFile
from common.statistics.records import Records, place_of

LOOKS = (8, 16, 32)
CERTAIN = {"n": 8, "difference": 0.02}
OPEN = {"n": 8, "difference": 0.002, "sd": 0.02}


def bought(claims, records, looks=LOOKS, count=32):
    """How many seeds each (variant, target) is bought for, and from which to which."""
    listed = {place_of(one): range(count) for one in records}
    file = ClaimsFile("demo", tuple(claims), "0" * 64, None)
    found = wanted(file, Records(records), looks, listed)
    have = {(place_of(one), one.seed) for one in records}
    new = found - have
    assert {seed for _, seed in found} <= set(range(count))
    counts = Counter((place[0], place[3]) for place, _ in new)
    return dict(counts), (min((s for _, s in new), default=None), max((s for _, s in new), default=None))


def at(target, what):
    options = dict(what)
    return pair(options.pop("difference"), target=target, seed=int(100 * target), **options)


def test_only_what_open_headline_and_supporting_claims_compare_is_bought():
    records = at(0.5, CERTAIN) + at(0.9, OPEN) + at(0.7, OPEN) + runs("other", sample(0.8, 8))
    claims = [
        claim(id="A", targets=[0.5]),
        claim(id="B", targets=[0.9]),
        claim(id="P", role="probe", targets=[0.7]),
    ]
    assert bought(claims, records) == ({("new", 0.9): 8, ("old", 0.9): 8}, (8, 15))
    assert bought(claims[:1], records)[0] == bought(claims[2:], records)[0] == {}


def test_of_an_open_claim_what_is_decided_is_not_bought():
    records = at(0.5, CERTAIN) + at(0.9, OPEN)
    assert bought([claim(targets=[0.5, 0.9])], records)[0] == {("new", 0.9): 8, ("old", 0.9): 8}


def test_after_the_last_look_nothing_is_bought():
    records = pair(0.0, n=32, sd=0.02)
    assert bought([claim()], records) == ({}, (None, None))
    assert bought([claim()], records, (8, 16, 32, 64), 64)[1] == (32, 63)
    # nor where there are not so many seeds
    assert bought([claim()], records, (8, 16, 32, 64), 48)[0] == {}


def test_all_that_a_comparison_reads_is_bought():
    gate = {"variant": "dense", "not_worse_than": "long", "by": 0.02}
    records = (
        at(0.9, OPEN) + dense(8) + runs("long", [0.95] * 8, target=0.0) + runs("new", [0.94] * 8, target=0.0)
    )
    records += runs("base", [0.7] * 8, target=0.9) + runs("unread", [0.7] * 8, target=0.9)
    sides = ({"variant": name, "minus": {"variant": "base"}} for name in ("new", "old"))
    minus = claim("superiority", *sides, precondition=gate)
    names = {("new", 0.9), ("old", 0.9), ("base", 0.9), ("dense", 0.0), ("long", 0.0), ("new", 0.0)}
    assert bought([minus], records)[0] == dict.fromkeys(names, 8)


def test_the_points_of_a_trend_are_bought():
    noise = sample(0.0, 8, sd=0.05)
    records = [
        record(f"step-{k}", s, 0.5 + k * x, target=0.0) for k in (1, 2, 3) for s, x in enumerate(noise)
    ]
    steps = [{"variant": f"step-{k}"} for k in (1, 2, 3)]
    trend = claim("trend", treatment={"target": 0.0}, control=None, steps=steps)
    assert bought([trend], records)[0] == {(f"step-{k}", 0.0): 8 for k in (1, 2, 3)}


def test_counts_and_signs_are_not_decided_by_seeds():
    cells = [r for k in range(3) for r in pair(0.001, n=8, architecture=f"net{k}", seed=k)]
    count = claim("count", control=None, value=0.83)
    assert bought([claim("sign")], cells)[0] == bought([count], cells)[0] == {}


def test_a_changed_claim_begins_with_new_seeds():
    records = at(0.5, CERTAIN) + at(0.9, OPEN)
    for role in ("supporting", "probe"):
        changed = claim(id="A", targets=[0.5], seen=7, role=role)
        assert bought([changed], records) == ({("new", 0.5): 8, ("old", 0.5): 8}, (8, 15))
    # the looks are its own: its second one ends with seed 23
    later = [one.model_copy(update={"seed": one.seed + 8}) for one in at(0.9, OPEN)]
    assert bought([claim(targets=[0.9], seen=7)], records + later)[1] == (16, 23)
    assert bought([claim(targets=[0.9], seen=7)], records, LOOKS, 15)[0] == {}


def test_later_records_do_not_change_what_earlier_looks_asked_for():
    """So that a stage that is stopped and resumed asks for the same."""
    records = at(0.5, CERTAIN) + at(0.9, OPEN)
    later = [one.model_copy(update={"seed": one.seed + 8}) for one in at(0.5, OPEN)]
    claims = [claim(id="A", targets=[0.5]), claim(id="B", targets=[0.9])]
    assert bought(claims, records) == bought(claims, records + later)


def test_what_is_not_run_at_all_is_not_bought():
    for control, expected in (("old", {("new", 0.9): 8, ("old", 0.9): 8}), ("nobody", {})):
        assert bought([claim(targets=[0.9], control=control, seen=7)], at(0.9, OPEN))[0] == expected
