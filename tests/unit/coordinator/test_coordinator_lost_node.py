"""A block of several workers loses a node: those on other nodes raise first, and Ray finds the node dead later."""

import asyncio
from types import SimpleNamespace

import pytest

from dbtrain.coordinator.exit_reasons import LOST_NODE, UNREACHABLE, in_words
from dbtrain.coordinator.ray import train_internals

A, B, C = ("a" * 56, "b" * 56, "c" * 56)
BROKEN = "Connection closed by peer [10.0.0.2]:15772"


class Ray:
    """A cluster in which each node is alive for so many looks, and answers or not."""

    def __init__(self, answers, looks=10**9):
        self.answers, self.looks = answers, looks

    def nodes(self):
        self.looks -= 1
        return [{"NodeID": node, "Alive": ok or self.looks > 0} for node, ok in self.answers.items()]

    def remote(self, **_):
        ask = SimpleNamespace(
            options=lambda scheduling_strategy: SimpleNamespace(remote=lambda: scheduling_strategy.node_id)
        )
        return lambda function: ask

    def get(self, call, timeout):
        if not self.answers[call]:
            raise TimeoutError


@pytest.fixture
def end(monkeypatch):
    """What the driver hears of an attempt whose workers ran on these nodes: ``end(cluster, *nodes)``."""
    rests, sleep = [], asyncio.sleep

    async def rest(seconds):
        rests.append(seconds)
        await sleep(0.001)

    def go(cluster, *nodes, said=BROKEN):
        monkeypatch.setattr(train_internals, "ray", cluster)
        monkeypatch.setattr(train_internals.asyncio, "sleep", rest)
        error = train_internals.WorkerGroupError("half a page", {0: RuntimeError(said)})
        start = train_internals.StartGuard()
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
        start.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers, has_started=lambda: False))
        start.after_controller_state_update(None, SimpleNamespace(training_failed_error=None))
        next_state = SimpleNamespace(training_failed_error=error)
        start.after_controller_state_update(None, SimpleNamespace(next_state=next_state))
        asyncio.run(start.before_controller_shutdown())
        return train_internals.reason(error, train_internals.WHOLE), len(rests)

    return go


def test_a_node_that_is_found_dead_some_time_after_the_broken_connection_is_told(end):
    told, looks = end(Ray({A: True, B: False}, looks=5), A, B)
    assert in_words(told) == LOST_NODE and BROKEN in told and looks == 5


def test_nodes_that_answer_are_not_waited_for(end):
    assert end(Ray({A: True, B: True}), A, B) == (f"RuntimeError: {BROKEN}", 1)


def test_another_node_of_the_cluster_is_none_of_its_business(end):
    assert end(Ray({A: True, B: True, C: False}, looks=0), A, B) == (f"RuntimeError: {BROKEN}", 1)


def test_workers_of_one_node_ask_nobody(end):
    assert end(None, A, A) == (f"RuntimeError: {BROKEN}", 0)


def test_a_worker_alone_that_does_not_answer_has_lost_its_node_where_that_is_found_dead(end):
    told, looks = end(Ray({A: False}, looks=5), A, said=UNREACHABLE)
    assert in_words(told) == LOST_NODE and UNREACHABLE in told and looks == 5


def test_a_worker_alone_that_does_not_answer_on_a_node_that_does_is_frozen(end):
    assert end(Ray({A: True}), A, said=UNREACHABLE) == (f"RuntimeError: {UNREACHABLE}", 1)


def test_a_node_that_neither_answers_nor_dies_is_not_waited_for_without_end(end, monkeypatch):
    monkeypatch.setattr(train_internals, "SILENT_S", 0.05)
    assert end(Ray({A: True, B: False}), A, B)[0] == f"RuntimeError: {BROKEN}"
