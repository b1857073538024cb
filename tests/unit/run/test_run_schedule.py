"""The learning rate of a run that was extended: a function of the step and of what run.json says."""

from dataclasses import replace

import pytest

from dbtrain.config import OptimizerConfig, TrainingConfig
from dbtrain.run.schedule import first_training, lengths_of, schedule_of, with_lengths
from dbtrain.shards.extension import Extension


def training(steps=600, blocks=None, **optimizer):
    return TrainingConfig(steps=steps, blocks=blocks or {}, optimizer=OptimizerConfig(**optimizer))


def extended(before, steps, held=True, extensions=()):
    """(section `training`, extensions) of a run whose block 0 goes on to so many steps."""
    after = with_lengths(before, replace(lengths_of(before), steps=steps))
    stretch = schedule_of(before, extensions, 0).extended(0, steps, held)
    record = Extension(0.0, "1", lengths_of(before), lengths_of(after), (stretch,))
    return after, (*extensions, Extension.parse(record.fields(), "run.json"))


def rates(schedule, steps=None):
    return [schedule.scale(step) for step in range(steps or schedule.end)]


def test_an_extended_wsd_run_has_the_rates_of_one_that_was_as_long_from_the_beginning():
    first = training(schedule="wsd", warmup=50, decay=0.2, final_lr=0.1)
    section, extensions = extended(first, 1000)
    section, extensions = extended(section, 1300, extensions=extensions)
    # its own warm-up: that of the first steps, which are trained
    whole = schedule_of(training(1300, schedule="wsd", warmup=50, decay=0.2, final_lr=0.1), (), 0)
    found = schedule_of(section, extensions, 0)
    assert [s.start for s in found.stretches] == [480, 800] and found.held == whole.held == 1040
    assert rates(found) == rates(whole)


def test_a_finished_cosine_climbs_to_the_cosine_of_the_new_length_and_follows_it():
    section, extensions = extended(training(warmup=60, final_lr=0.1), 1200)
    found, before = schedule_of(section, extensions, 0), schedule_of(training(warmup=60, final_lr=0.1), (), 0)
    longer = schedule_of(training(1200, warmup=60, final_lr=0.1), (), 0)
    assert rates(found, 600) == rates(before) and rates(found)[660:] == rates(longer)[660:]
    climb = rates(found)[599:661]
    assert all(a < b for a, b in zip(climb[1:50], climb[2:51], strict=True)) and climb[1] == pytest.approx(
        0.1, abs=0.02
    )
    assert max(abs(a - b) for a, b in zip(climb, climb[1:], strict=False)) < 0.02  # no jump


def test_a_wsd_run_without_a_checkpoint_before_its_decay_climbs_as_well():
    section, extensions = extended(training(schedule="wsd", warmup=60, decay=0.2), 1200, held=False)
    found = rates(schedule_of(section, extensions, 0))
    assert found[:600] == rates(schedule_of(training(schedule="wsd", warmup=60, decay=0.2), (), 0))
    assert found[600] == pytest.approx(1 / 60) and found[659:960] == [1.0] * 301 and found[961] < 1


def test_a_warm_up_that_has_not_ended_goes_on():
    section, extensions = extended(training(60, warmup=100), 200)
    assert rates(schedule_of(section, extensions, 0)) == rates(schedule_of(training(200, warmup=100), (), 0))


def test_a_block_of_its_own_length_keeps_its_warm_up_when_the_others_become_longer():
    before = training(600, {2: {"steps": 900, "lr": 0.5}}, warmup=100)
    section, extensions = extended(before, 4000)
    assert section.steps == 4000 and section.blocks == before.blocks
    assert first_training(section, extensions) == before
    assert schedule_of(section, extensions, 2) == schedule_of(before, (), 2)
    assert schedule_of(section, extensions, 2).warmup == 150


def test_a_step_is_trained_alike_by_two_records_up_to_where_they_part():
    first = training(schedule="wsd", warmup=50, decay=0.2)
    section, extensions = extended(first, 1000)
    old, new = schedule_of(first, (), 0), schedule_of(section, extensions, 0)
    assert new.agrees(old, 480) and not new.agrees(old, 481) and old.agrees(old, 600)
    assert not new.agrees(schedule_of(*extended(first, 900), 0), 481)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 10), (10, 50), (10, 9)])
def test_a_schedule_without_a_stable_phase_holds_no_checkpoint(steps, warmup):
    assert schedule_of(training(steps, schedule="wsd", warmup=warmup, decay=0.5), (), 0).held in (None, 9)
    assert schedule_of(training(steps, warmup=warmup), (), 0).held is None
