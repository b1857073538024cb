import pytest

from dbtrain.errors import ConfigError
from dbtrain.telemetry import trackers
from dbtrain.telemetry.trackers import Trackers

STEP = {"event": "step", "step": 3, "loss": 0.5, "memory": 7, "seconds": 2.0, "steps": 4}


class Tracker:
    """Keeps what it is given, and fails in what it is told to fail in."""

    requires_logging_directory = False
    made: list["Tracker"] = []
    fails: tuple[str, ...] = ()

    def __init__(self, project):
        self.calls = []
        Tracker.made.append(self)

    def _call(self, name, *what):
        self.calls.append((name, *what))
        if name in self.fails:
            raise OSError("no space\nleft")

    def store_init_configuration(self, values):
        self._call("configure", values)

    def log(self, values, step):
        self._call("log", values, step)

    def finish(self):
        self._call("finish")


class Failing(Tracker):
    pass


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(trackers, "LOGGER_TYPE_TO_CLASS", {"good": Tracker, "bad": Failing})

    def go(*fails):
        monkeypatch.setattr(Tracker, "made", [])
        monkeypatch.setattr(Failing, "fails", fails, raising=False)
        told = []
        return Trackers(["bad", "good"], "project", "folder", {"a": {"b": 1}, "c": (2,)}, told.append), told

    return go


def test_steps_of_all_blocks_are_logged(start):
    made, told = start()
    made.log(2, STEP)
    made.log(2, {"event": "commit", "step": 3})
    made.close()
    values = {"block2/loss": 0.5, "block2/memory_bytes": 7, "block2/steps_per_second": 2.0}
    for tracker in Tracker.made:
        assert tracker.calls == [("configure", {"a.b": 1, "c": "(2,)"}), ("log", values, 3), ("finish",)]
    assert len(Tracker.made) == 2 and told == []


@pytest.mark.parametrize(
    ("fails", "calls"), [("log", ["configure", "log"]), ("finish", ["configure", "log", "log", "finish"])]
)
def test_a_tracker_that_fails_is_told_once_and_given_up_and_the_others_go_on(start, fails, calls):
    made, told = start(fails)
    for _ in range(2):
        made.log(0, STEP)
    made.close()
    bad, good = Tracker.made
    assert [call[0] for call in bad.calls] == calls
    assert [call[0] for call in good.calls] == ["configure", "log", "log", "finish"]
    assert len(told) == 1 and "bad fails and gets no more (OSError: no space left)" in told[0]


def test_a_tracker_that_refuses_the_configuration_is_a_users_mistake(start):
    with pytest.raises(ConfigError, match="bad does not start"):
        start("configure")
