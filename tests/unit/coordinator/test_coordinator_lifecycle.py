import dataclasses

import pytest

from dbtrain.coordinator.lifecycle import FINAL, BlockState, Budgets, Exit, Phase, ended, placed, running

BUDGETS = Budgets(max_crashes=3, max_preemptions=2, backoff_s=1.0)
NOW = 100.0


def crash(state, step=0, budgets=BUDGETS):
    return ended(state, Exit("crashed", "boom", step), budgets, NOW)


def after_crashes(count, budgets=BUDGETS):
    state = BlockState(1)
    for _ in range(count):
        state = crash(state, budgets=budgets)
    return state


def test_an_attempt_gets_the_next_number_and_runs():
    state = placed(BlockState(1, attempt=4))
    assert (state.phase, state.attempt) == (Phase.PLACED, 5)
    assert running(state).phase is Phase.RUNNING and running(state).attempt == 5


def test_done_is_final_and_forgets_old_errors():
    state = ended(BlockState(1, error="an old crash"), Exit("done", "", 600), BUDGETS, NOW)
    assert (state.phase, state.committed, state.error) == (Phase.DONE, 600, None)


@pytest.mark.parametrize(("kind", "phase"), [("stopped", Phase.STOPPED), ("failed", Phase.FAILED)])
def test_what_another_attempt_would_not_mend_is_final_and_uses_no_budget(kind, phase):
    state = ended(BlockState(1, committed=3), Exit(kind, "because", 5), BUDGETS, NOW)
    assert (state.phase, state.committed, state.error) == (phase, 5, "because")
    assert (state.crashes, state.preemptions, state.restarts) == (0, 0, 0)
    assert phase in FINAL


def test_a_crash_brings_the_block_back_until_its_budget_is_spent():
    phases = [after_crashes(count).phase for count in (1, 2, 3, 4)]
    assert phases == [Phase.PENDING] * 3 + [Phase.FAILED]
    assert after_crashes(4).restarts == 3 and after_crashes(4).error == "boom"


def test_without_a_budget_the_first_crash_is_the_last():
    none = Budgets(0, 0, 1.0)
    assert after_crashes(1, none).phase is Phase.FAILED
    assert ended(BlockState(1), Exit("preempted", "taken", 0), none, NOW).phase is Phase.FAILED


def test_a_crash_after_progress_starts_a_new_budget():
    worn = after_crashes(3)
    back = crash(worn, step=10)
    assert (back.phase, back.crashes, back.committed) == (Phase.PENDING, 1, 10)
    # and one that made none since goes on counting
    assert crash(back, step=10).crashes == 2
    state = BlockState(1)
    for step in range(1, 50):
        state = crash(state, step=step)
    assert state.phase is Phase.PENDING and state.restarts == 49


def test_pauses_double_from_crash_to_crash_and_are_capped():
    many = Budgets(max_crashes=50, max_preemptions=0, backoff_s=1.0)
    pauses = [after_crashes(count, many).not_before - NOW for count in range(2, 20)]
    assert all(b == min(2 * a, 60) for a, b in zip(pauses, pauses[1:], strict=False))
    assert 0 < pauses[0] < 60 and pauses[-1] == 60
    assert crash(after_crashes(10, many), step=10, budgets=many).not_before - NOW <= 1  # progress forgives


def test_preemptions_have_a_budget_of_their_own_and_no_pause():
    state = after_crashes(3)
    for count in (1, 2):
        state = ended(state, Exit("preempted", "spot instance taken", 0), BUDGETS, NOW)
        assert (state.phase, state.preemptions, state.crashes) == (Phase.PENDING, count, 3)
        assert state.not_before == NOW
    assert ended(state, Exit("preempted", "again", 0), BUDGETS, NOW).phase is Phase.FAILED


def test_progress_does_not_refill_preemptions():
    state = dataclasses.replace(BlockState(1), preemptions=2)
    assert ended(state, Exit("preempted", "again", 50), BUDGETS, NOW).phase is Phase.FAILED


def same(state, step=0, cause="ValueError: bad at step 7"):
    return ended(state, Exit("crashed", "ValueError: bad", step, cause), BUDGETS, NOW)


def test_an_error_that_comes_twice_at_the_same_step_without_a_commit_between_is_final():
    once = same(BlockState(0))
    assert once.phase is Phase.PENDING
    twice = same(once)
    assert twice.phase is Phase.FAILED and twice.restarts == 1
    assert twice.error.startswith("ValueError: bad; it came twice at the same step")


def test_another_error_another_step_or_a_commit_between_brings_it_back():
    once = same(BlockState(0))
    assert same(once, cause="ValueError: bad at step 8").phase is Phase.PENDING
    assert same(once, step=5).phase is Phase.PENDING  # it got further than the first time
    assert same(same(once, step=5), step=5).phase is Phase.FAILED


def test_what_comes_from_outside_between_two_equal_errors_excuses_neither():
    killed = crash(same(BlockState(0)))
    preempted = ended(same(BlockState(0)), Exit("preempted", "spot", 0), BUDGETS, NOW)
    assert same(killed).phase is Phase.FAILED and same(preempted).phase is Phase.FAILED
    moved = ended(same(BlockState(0)), Exit("preempted", "spot", 5), BUDGETS, NOW)
    assert same(moved, step=5).phase is Phase.PENDING
