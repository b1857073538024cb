import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from dbtrain.errors import ConfigError, IncompleteRunError
from dbtrain.experiments.chaos import Punisher
from dbtrain.experiments.tally import WEIGHTS, Fault, Tally, difference
from dbtrain.experiments.victims import await_commit, controllers, descendants, send, workers
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import EventLog

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def sleeper():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def punisher(make_config, *overrides, time_limit_s=0.0):
    return Punisher(["config.yaml"], make_config(*overrides), 5.0, 0, time_limit_s, lambda line: None)


def test_any_missing_or_other_byte_is_a_difference():
    shards = {"00/model": b"abc", "01/model": b"def"}
    assert difference(shards, dict(shards)) is None
    assert "01/model" in difference({"00/model": b"abc"}, shards)
    assert "00/model" in difference({**shards, "00/model": b"abd"}, shards)
    assert difference({}, {}) is not None  # nothing proves nothing


def test_only_a_local_run_of_its_own_cluster_is_punished(make_config, tmp_path):
    with pytest.raises(ConfigError, match="local directory"):
        punisher(make_config, "out=s3://bucket")
    with pytest.raises(ConfigError, match="leave it out"):
        punisher(make_config, "cluster.address=auto")
    with pytest.raises(ConfigError, match="compares bits"):
        punisher(make_config, "training.deterministic=false")
    punisher(make_config)
    with pytest.raises(ConfigError, match="remove it"):
        punisher(make_config)  # the shards of an earlier punishment would prove nothing


def test_an_undisturbed_run_that_fails_is_told(make_config):
    with pytest.raises(IncompleteRunError, match="undisturbed run fails already"):
        punisher(make_config).punish(1)  # there is no config.yaml


def test_a_worker_is_found_by_its_word_and_only_while_it_lives(tmp_path, sleeper):
    run = Run(Store(tmp_path))
    for block, pid in ((0, sleeper.pid), (1, os.getpid())):
        EventLog(run.block(block).attempt(3)).emit("start", pid=pid)
    (found,) = workers(run, os.getpid())  # this process is not below itself
    assert (found.block, found.attempt, found.process.pid) == (0, 3, sleeper.pid)
    EventLog(run.block(0).attempt(3)).emit("end", outcome="done")
    assert workers(run, os.getpid()) == []


def test_a_signal_hits_only_what_is_there(sleeper):
    process = next(p for p in descendants(os.getpid()) if p.pid == sleeper.pid)
    assert send(process, signal.SIGSTOP) and send(process, signal.SIGCONT) and send(process, signal.SIGKILL)
    sleeper.wait()
    assert not send(process, signal.SIGKILL)
    assert not controllers(os.getpid())


def test_a_commit_is_recognised_by_its_unfinished_files(tmp_path):
    folder = tmp_path / "blocks" / "00" / "step_00000010"
    folder.mkdir(parents=True)
    assert await_commit(Run(Store(tmp_path)), 0)
    (folder / "COMMIT.json").write_text("{}")
    before = time.monotonic()
    assert not await_commit(Run(Store(tmp_path)), 0)
    assert time.monotonic() - before >= 1.0


def test_a_block_that_began_too_often_is_found(make_config, tmp_path):
    judge = punisher(make_config)
    run = Run(Store(tmp_path / "run"))
    for attempt in (1, 2, 3):
        run.block(1).attempt(attempt).makedirs()
    assert "block 1 made 3 attempts" in judge._lost(run, 1)
    judge._aimed = Counter({1: 1, None: 1})
    assert judge._lost(run, 1) is None
    assert "block 1" in judge._lost(run, 0)


def test_the_tally_shows_every_kind():
    tally = Tally(Counter({Fault.WORKER_KILL: 3}), runs=2)
    assert tally.table().row_count == len(WEIGHTS) + 1


def test_a_punishment_without_a_fault_proves_nothing(make_config, monkeypatch):
    monkeypatch.setattr(Punisher, "_undisturbed", lambda self: {"00/model": b"abc"})
    with pytest.raises(IncompleteRunError, match="not one fault"):
        punisher(make_config, time_limit_s=-1.0).punish(3)
