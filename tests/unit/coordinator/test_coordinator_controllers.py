"""The process that has the controllers of all attempts: frozen, dead, and what it is told of its workers."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from dbtrain.coordinator.exit_reasons import LOST_CONTROLLERS, classify, in_words
from dbtrain.coordinator.progress import Progress
from dbtrain.coordinator.ray import train_internals
from dbtrain.coordinator.ray.train_internals import ControllerProcess, ControllersDied, TrainControllers, reason

FROZEN = ActorUnavailableError("no answer", None)


@pytest.fixture
def process(monkeypatch):
    """A process whose actor gives these answers, or raises them, one after the other; and what it was asked."""
    asked, released = [], []

    def made(*answers):
        turns = iter(answers)

        def answer(name):
            asked.append(name)
            result = next(turns)
            if isinstance(result, Exception):
                raise result
            return result

        actor = SimpleNamespace(run=SimpleNamespace(remote=lambda name, wanted: name))
        monkeypatch.setattr(train_internals.ray, "get", answer)
        monkeypatch.setattr(train_internals.time, "sleep", lambda s: None)
        monkeypatch.setattr(train_internals, "release_orphans", lambda: released.append(1))
        monkeypatch.setattr(ControllerProcess, "_start", staticmethod(lambda: actor))
        return ControllerProcess(), asked, released

    return made


def test_one_that_does_not_answer_is_asked_for_the_same_attempt_again(process):
    controllers, asked, released = process(FROZEN, FROZEN, "result")
    assert controllers.run({}) == "result"
    assert len(asked) == 3 and len(set(asked)) == 1 and not released


def test_one_that_is_dead_is_replaced_and_says_so(process):
    controllers, _, released = process(FROZEN, ActorDiedError())
    with pytest.raises(ControllersDied) as caught:
        controllers.run({})
    assert released and controllers._actor is None
    assert in_words(reason(caught.value, 4000)) == LOST_CONTROLLERS


def test_the_death_of_a_worker_that_a_controller_tells_is_none_of_its_own(process):
    told = RayTaskError("run", "text", FROZEN).as_instanceof_cause()
    controllers, asked, released = process(told)
    with pytest.raises(RayTaskError):
        controllers.run({})
    assert len(asked) == 1 and not released


@pytest.mark.parametrize(("stopping", "kind"), [(False, "preempted"), (True, "stopped")])
def test_a_block_is_not_blamed_for_it(stopping, kind):
    said = Progress()
    said.end = {"outcome": "stopped", "reason": "SIGTERM"}  # of Ray, which takes its workers away
    exit_ = classify(said, f"ControllersDied: {train_internals.CONTROLLERS_DIED} {FROZEN}", 10, 20, stopping)
    assert (exit_.kind, exit_.reason) == (kind, LOST_CONTROLLERS)


def test_an_attempt_begins_once_however_often_it_is_asked_for(monkeypatch):
    begun = []
    monkeypatch.setattr(train_internals, "_control", lambda wanted: begun.append(wanted) or wanted)

    async def ask():
        actor = TrainControllers()
        return await asyncio.gather(actor.run("a", "A"), actor.run("a", "A"), actor.run("b", "B"))

    assert asyncio.run(ask()) == ["A", "A", "B"]
    assert sorted(begun) == ["A", "B"]
