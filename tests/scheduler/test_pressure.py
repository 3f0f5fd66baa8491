"""When requests are adapted with engage: pressure."""

import pytest

from vllm_avl.config import AVLConfig, parse_config
from vllm_avl.scheduler.pressure import Pressure


def pressure(**settings):
    return Pressure(AVLConfig(engage="pressure", **settings))


def test_always_is_always():
    assert Pressure(AVLConfig()).update(0, [1], 100)
    assert Pressure(AVLConfig()).engaged


@pytest.mark.parametrize(
    ("held", "wanted", "engages"),
    [(0, [10], False), (69, [10], False), (70, [10], True), (0, [10] * 8, True)],
    ids=["empty", "below", "at-the-limit", "a-queue"],
)
def test_what_runs_and_waits_counts(held, wanted, engages):
    assert pressure().update(held, wanted, 100) is engages


def test_it_lets_go_well_below_where_it_engaged():
    short = pressure()
    seen = [short.update(held, [10], 100) for held in (65, 75, 65, 50, 49, 55, 65)]
    assert seen == [False, True, True, True, False, False, False]


def test_a_long_queue_is_not_read_to_its_end():
    read = []

    def queue():
        for index in range(1000):
            read.append(index)
            yield 10

    assert pressure().update(0, queue(), 100)
    assert len(read) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engage": "sometimes"}, "engage = 'sometimes': must be always or pressure"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match="avl") as caught:
        parse_config({"avl": settings})
    assert message in str(caught.value)
