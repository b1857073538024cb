import threading
import time

import pytest
import torch

from dbtrain.errors import ShardError
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import EventLog, read_events
from dbtrain.training import watchdog
from dbtrain.training.assignment import Assignment
from dbtrain.training.compilation import compilations
from dbtrain.training.watchdog import STOP, StopRequest, Watchdog


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LOCAL_POLL_S", 0.01)
    run, block = Store(tmp_path), Store(tmp_path / "blocks" / "00")
    claim(block, 1, "mine")
    told = Assignment(str(tmp_path), 0, 1, "mine", "session-a", 1, None, "cpu", 1, hang_timeout_s=60.0)
    stop = StopRequest()
    dog = Watchdog(run, block, told, stop)
    dog.start()
    yield run, stop
    dog.close()


def wait(condition, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not condition():
        time.sleep(0.01)
    return condition()


def test_a_stop_request_of_its_own_coordinator_is_heard(watched):
    run, stop = watched
    run.write_json(STOP, {"session": "session-a", "reason": "SIGTERM"})
    assert wait(lambda: stop.requested, 5) and stop.reason == "SIGTERM"


def test_a_stop_request_left_by_an_earlier_coordinator_is_not_heard(watched):
    run, stop = watched
    run.write_json(STOP, {"session": "session-of-yesterday", "reason": "SIGTERM"})
    assert not wait(lambda: stop.requested, 0.3)


def test_the_first_reason_stays():
    stop = StopRequest()
    assert not stop.requested
    stop.request("SIGUSR1")
    stop.request("SIGTERM")
    assert stop.requested and stop.reason == "SIGUSR1"


@pytest.fixture
def clocked(tmp_path, monkeypatch):
    """(start a watchdog with a patience of 0.2 s and this log, its store, codes with which it ended the process)"""
    monkeypatch.setattr(watchdog, "LOCAL_POLL_S", 0.01)
    exits, dogs, block = [], [], Store(tmp_path / "blocks" / "00")
    claim(block, 1, "mine")

    def leave(code):
        exits.append(code)
        dogs[-1].close()

    def start(log):
        told = Assignment(str(tmp_path), 0, 1, "mine", "session-a", 2, None, "cpu", 1, hang_timeout_s=0.2)
        dogs.append(Watchdog(Store(tmp_path), block, told, StopRequest(), log))
        dogs[-1].start()
        return dogs[-1]

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    yield start, block.child("attempts", "1"), exits
    for dog in dogs:
        dog.close()


def test_a_worker_that_hangs_says_so_and_ends(clocked):
    start, store, exits = clocked
    start(EventLog(store))
    assert wait(lambda: exits, 5) and exits == [watchdog.EXIT_HUNG]
    [end] = read_events(store)
    assert (end["event"], end["outcome"]) == ("end", "crashed")
    assert "no step for 0.2 s" in end["error"] and "cluster.hang_timeout_s" in end["error"]


def test_a_worker_that_hangs_ends_though_its_storage_hangs_too(clocked, monkeypatch):
    start, store, exits = clocked
    monkeypatch.setattr(watchdog, "LAST_WORDS_S", 0.1)
    released = threading.Event()
    monkeypatch.setattr(store, "append", lambda name, data: released.wait(20))
    start(EventLog(store))
    assert wait(lambda: exits, 5)
    released.set()


def test_reading_and_writing_checkpoints_is_no_hang_and_what_follows_may_be_one(clocked):
    start, store, exits = clocked
    dog = start(EventLog(store))
    with pytest.raises(ShardError), dog.patient():
        assert not wait(lambda: exits, 0.6)
        raise ShardError("the disk is full")
    assert wait(lambda: exits, 5)


def test_compiling_is_no_hang_and_what_follows_may_be_one(clocked):
    start, store, exits = clocked
    torch.compile(lambda x: x.cos(), backend="eager")(torch.zeros(1))  # imports the compiler, before the clock runs
    dog = start(EventLog(store))
    compiled = []

    def slow(graph, inputs):
        compiled.append(wait(lambda: exits, 0.6))
        return graph.forward

    def end(seconds):
        compiled.append(seconds)
        dog.touch()

    with compilations(dog.compiling, end):
        assert torch.compile(lambda x: x.sin(), backend=slow)(torch.zeros(1)) == 0
    ended_while_compiling, seconds = compiled
    assert not ended_while_compiling and seconds >= 0.6
    assert wait(lambda: exits, 5)


def test_a_compiler_that_hangs_is_ended_too(clocked, monkeypatch):
    monkeypatch.setattr(watchdog, "COMPILING_S", 0.1)
    start, store, exits = clocked
    start(EventLog(store)).compiling()
    assert wait(lambda: exits, 5)


def test_ranks_that_wait_for_the_first_leave_the_clock_to_it(clocked):
    start, _, exits = clocked
    start(None)
    assert not wait(lambda: exits, 0.6)
