import time

import pytest

from dbtrain.shards.fence import claim
from dbtrain.shards.store import Store
from dbtrain.training import watchdog
from dbtrain.training.assignment import Assignment
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
