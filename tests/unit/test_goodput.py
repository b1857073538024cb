"""The simulation of failures against closed forms, where there are any."""

import math
import random

import pytest

from benchmarks.goodput import Costs, best_interval, bubble, closed_form, elastic, group, pace

HOUR = 3600.0
SURE = 20_000
"""Events, so that the standard error of a share is below 0.004."""


def costs(**given: float) -> Costs:
    return Costs(**{"mtbf": 30 * HOUR, "restart": 54, "stall": 7, "write": 0, **given})


@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
@pytest.mark.parametrize("stall", [7.0, 70.0])
def test_a_group_loses_what_the_closed_form_says(gpus: int, stall: float) -> None:
    given = costs(stall=stall)
    interval = best_interval(given, gpus)
    found = group(given, gpus, interval, random.Random(1), SURE).share
    assert found == pytest.approx(closed_form(given, gpus, interval), abs=0.012)


def test_no_other_interval_is_better_than_the_best_by_more_than_chance() -> None:
    given = costs()
    best = closed_form(given, 64, best_interval(given, 64))
    others = [closed_form(given, 64, best_interval(given, 64) * factor) for factor in (0.25, 0.5, 0.8, 1.25, 2, 4)]
    assert best > max(others)
    assert best_interval(given, 1) == pytest.approx(math.sqrt(2 * 7 * 30 * HOUR), rel=0.02)  # Young's


def test_replicas_are_there_as_often_as_their_restarts_allow() -> None:
    given = costs(mtbf=HOUR, quorum=0)
    done = elastic(given, 64, 8, random.Random(2), SURE)
    rate = 8 * given.rate
    restart = math.expm1(rate * given.restart) / rate  # what fails in a restart begins it anew
    assert done.share == pytest.approx(1 / (1 + rate * restart), abs=0.01)


def test_a_quorum_stops_every_replica() -> None:
    given = costs(mtbf=300 * HOUR, quorum=30, restart=1)
    done = elastic(given, 64, 8, random.Random(3), SURE)
    # one when a replica goes, and one second later another when it comes
    assert done.share == pytest.approx(1 / (1 + 64 * given.rate * 31), abs=0.01)


def test_a_warning_that_lasts_for_a_commit_loses_no_work() -> None:
    spot = costs(mtbf=math.inf, preempted=HOUR, stall=1, write=20, replace=0, warning=30)
    blunt = costs(mtbf=math.inf, preempted=HOUR, stall=1, write=20, replace=0, warning=10)
    warned, surprised = (group(c, 8, 60, random.Random(4), SURE).share for c in (spot, blunt))
    mean = HOUR / 8
    restart = mean * math.expm1(54 / mean)
    assert warned == pytest.approx(60 / 61 * mean / (mean + restart + 21), abs=0.01)
    assert surprised < warned - 0.05


def test_a_group_that_cannot_finish_an_interval_does_nothing_useful() -> None:
    given = costs(stall=60, write=600)
    assert group(given, 16384, best_interval(given, 16384), random.Random(5)).share < 0.001
    assert closed_form(given, 1 << 22, 600) == 0


def test_bubbles_and_slow_gpus() -> None:
    assert bubble(8, 64) == pytest.approx(7 / 71)  # (p - 1) / (m + p - 1)
    assert bubble(8, 64, interleaved=2) < bubble(8, 64)
    assert pace(1, 0.01, 0.7) == pytest.approx(0.997)
    assert pace(10_000, 0.01, 0.7) == pytest.approx(0.7)
