"""What a worker tells, hears and waits for between its steps, without an engine."""

import pytest
import torch

from dbtrain.shards.fence import claim
from dbtrain.telemetry.events import EventLog
from dbtrain.training.assignment import Assignment
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker


@pytest.fixture
def make_worker(make_run):
    def make(workers=1, rank=0):
        _, run = make_run()
        store = run.child("blocks", "01")
        claim(store, 1, "mine")
        told = Assignment(run.url, 1, 1, "mine", "session", workers, None, "cpu", 1, 60.0)
        return BlockWorker(told, rank, StopRequest(), EventLog(store.child("attempts", "1"), rank))

    return make


def test_a_commit_that_waits_for_the_one_before_is_no_hang(make_worker, monkeypatch):
    worker, waits = make_worker(), []
    monkeypatch.setattr(worker.writer, "submit", lambda write: waits.append(worker.watchdog._touched) or 0.0)
    worker.commit(1, {"model": {"model.stem.w": torch.ones(2)}}, 0.5)
    assert waits == [float("inf")] and worker.watchdog._touched < float("inf")
    assert worker.watchdog.log is worker.log and make_worker(2, rank=1).watchdog.log is None
