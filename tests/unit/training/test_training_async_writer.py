"""One commit is written, one may wait, and of those that wait the newest counts."""

import threading

import pytest

from dbtrain.errors import ShardError
from dbtrain.training.async_writer import BackgroundWriter


class Held:
    """A function of the writer that begins and ends when the test says."""

    def __init__(self, log, name):
        self.log, self.name = log, name
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.go.wait(60)
        self.log.append(self.name)

    def dropped(self):
        self.log.append(f"no {self.name}")


def test_a_commit_that_waits_gives_way_to_the_next_one_and_the_last_one_is_always_written():
    log, writer = [], BackgroundWriter()
    jobs = [Held(log, name) for name in range(5)]
    writer.submit(jobs[0], jobs[0].dropped)
    assert jobs[0].begun.wait(60)
    for job in jobs[1:]:  # none of these calls waits for the first one, which goes on
        writer.submit(job, job.dropped)
    assert log == ["no 1", "no 2", "no 3"] and not jobs[4].begun.is_set()
    for job in jobs:
        job.go.set()
    writer.close()
    writer.close()
    assert log == ["no 1", "no 2", "no 3", 0, 4]
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(jobs[0])


def test_what_waits_can_be_dropped_before_anything_newer_is_there():
    log, writer = [], BackgroundWriter()
    first, second = Held(log, 1), Held(log, 2)
    writer.submit(first, first.dropped)
    assert first.begun.wait(60)
    writer.submit(second, second.dropped)
    writer.drop_waiting()
    writer.drop_waiting()
    first.go.set()
    writer.drain()
    assert log == ["no 2", 1]


def test_one_runs_at_a_time():
    running, most, writer = [], [], BackgroundWriter()

    def work():
        running.append(1)
        most.append(len(running))
        running.pop()

    for _ in range(50):
        writer.submit(work)
    writer.drain()
    assert set(most) == {1} and 1 <= len(most) <= 50


def fail():
    raise ShardError("disk full")


def test_an_error_is_raised_once_at_the_next_call_and_what_came_after_it_is_dropped():
    log, writer, gate = [], BackgroundWriter(), threading.Event()
    writer.submit(lambda: gate.set() or fail())
    assert gate.wait(60)
    with writer._changed:
        assert writer._changed.wait_for(lambda: not writer._running, 60)
    with pytest.raises(ShardError, match="disk full"):
        writer.submit(lambda: log.append("run"), lambda: log.append("dropped"))
    writer.drain()
    assert log == ["dropped"]
    for end in (writer.drain, writer.close):
        writer.submit(fail)
        with pytest.raises(ShardError):
            end()


def test_what_waits_behind_a_commit_that_fails_is_not_begun():
    log, writer = [], BackgroundWriter()
    begun, gate = threading.Event(), threading.Event()

    def fail_later():
        begun.set()
        assert gate.wait(60)
        fail()

    writer.submit(fail_later)
    waiting = Held(log, 1)
    assert begun.wait(60)
    writer.submit(waiting, waiting.dropped)
    gate.set()
    with pytest.raises(ShardError):
        writer.close()
    assert log == ["no 1"] and not waiting.begun.is_set()


def test_it_runs_on_a_daemon_thread():
    seen, writer = [], BackgroundWriter()
    writer.submit(lambda: seen.append(threading.current_thread()))
    writer.close()
    assert seen[0].daemon and seen[0] is not threading.current_thread()
