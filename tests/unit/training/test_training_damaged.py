"""A block whose checkpoints are damaged: the one before, and when there is none, a refusal that names them all."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dbtrain.errors import ShardError, WorkerError
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.storage.fence import claim
from dbtrain.telemetry.events import EventLog, EventTail, events_of, read_events
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import work
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker


@pytest.fixture
def make_worker(make_run):
    """A worker of block 1 with commits of steps 1 and 2; it restores into a list instead of an engine."""

    def make(*overrides):
        _, run = make_run(*overrides)
        store = run.child("blocks", "01")
        claim(store, 1, "mine")
        log = EventLog(store.child("attempts", "1"))
        told = Assignment(run.url, 1, 1, "mine", "session", 1, None, "cpu", 1, 60.0)
        worker = BlockWorker(told, 0, StopRequest(), log)
        for step in (1, 2):
            weights = {"blocks.1.stem.w": torch.full((2,), float(step))}
            parts = {"model": weights, "optim": {"exp_avg/blocks.1.stem.w": torch.zeros(2)}}
            Checkpoints(store, worker.identity).commit(step, parts, loss=0.5, attempt=1, fence=lambda: None)
        restored = []
        return worker, SimpleNamespace(restore=lambda parts, step: restored.append(step)), restored

    return make


def damage(worker, *steps):
    for step in steps:
        path = worker.store.path / f"step_{step:08d}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))


def test_the_one_before_a_damaged_one_is_taken(make_worker):
    worker, engine, restored = make_worker()
    damage(worker, 2)
    assert worker._resume(engine) == 1 and restored == [1]
    assert [e["event"] for e in read_events(worker.log.store)] == ["skipped", "resumed"]


def test_a_block_without_a_whole_checkpoint_does_not_start_again_unasked(make_worker):
    worker, engine, restored = make_worker()
    damage(worker, 1, 2)
    with pytest.raises(
        WorkerError, match="all 2 checkpoints of block 1.*step_00000002.*step_00000001.*restart_damaged=true"
    ):
        worker._resume(engine)
    assert restored == []


def test_a_block_starts_again_when_asked(make_worker):
    worker, engine, restored = make_worker("cluster.restart_damaged=true")
    damage(worker, 1, 2)
    assert worker._resume(engine) == 0 and restored == []


def without_optimizer(worker, step):
    """What a block leaves that was done at this step, with training.keep_optimizer=false."""
    parts = {"model": {"blocks.1.stem.w": torch.full((2,), 9.0)}}
    worker.checkpoints.commit(step, parts, loss=0.5, attempt=1, fence=lambda: None)
    worker.checkpoints.keep_only(step)


def test_a_block_that_gave_up_its_optimizer_is_not_trained_on_unasked(make_worker):
    worker, engine, restored = make_worker("training.steps=20", "training.keep_optimizer=false")
    without_optimizer(worker, 10)
    with pytest.raises(WorkerError, match="block 1 was done at step 10.*cluster.restart_optimizer=true"):
        worker._resume(engine)
    assert restored == []


def test_a_block_is_trained_on_with_an_optimizer_that_starts_anew_when_asked(make_worker):
    worker, engine, restored = make_worker("training.steps=20", "cluster.restart_optimizer=true")
    without_optimizer(worker, 10)
    assert worker._resume(engine) == 10 and restored == [10]
    told = read_events(worker.log.store)
    assert [e["event"] for e in told] == ["note", "resumed"] and "starts anew" in told[0]["reason"]


def test_a_block_that_is_done_needs_no_optimizer_to_say_so(make_worker):
    worker, engine, restored = make_worker("training.steps=10", "training.keep_optimizer=false")
    without_optimizer(worker, 10)
    assert worker._resume(engine) == 10 and restored == [10]


def test_a_worker_takes_the_settings_of_this_start_and_not_of_the_first(make_worker, make_config):
    worker, _, _ = make_worker()
    now = make_config("training.checkpoint_every=3", "training.zero_stage=1")
    told = replace(worker.assignment, config=now.model_dump(mode="json"))
    again = BlockWorker(told, 0, StopRequest(), worker.log)
    assert (worker.config.training.zero_stage, again.config.training.zero_stage) == (0, 1)
    assert again.config == now and again.run_plan.split == worker.run_plan.split


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_workers_records_its_error_and_raises_it_for_the_others(make_worker, monkeypatch, rank):
    worker, _, _ = make_worker()

    def fail(self):
        raise WorkerError("all 2 checkpoints are damaged")

    monkeypatch.setattr(BlockWorker, "_train", fail)
    with pytest.raises(WorkerError, match="all 2 checkpoints"):
        work(replace(worker.assignment, workers=2), rank, StopRequest())
    end = EventTail(worker.log.store, rank).read()[-1]
    assert (end["outcome"], end["retry"], end.get("rank", 0)) == ("failed", False, rank)
    assert "all 2 checkpoints" in end["error"] and worker.log.store.list() == [events_of(rank)]


def test_a_kill_in_a_commit_comes_after_its_shards_and_before_what_makes_it_count(make_worker, monkeypatch):
    monkeypatch.setenv("DBTRAIN_FAULTS", '[{"block": 1, "step": 3, "kind": "kill_in_commit"}]')
    worker, _, _ = make_worker()
    found = []
    monkeypatch.setattr(
        "os.kill", lambda pid, number: found.append((number, worker.store.child("step_00000003").list()))
    )
    state = {name: torch.ones(2) for name in ("exp_avg/model.stem.w", "exp_avg_sq/model.stem.w")}
    parts = {"model": {"model.stem.w": torch.ones(2)}, "optim": state}
    snapshot = SimpleNamespace(parts=parts, wait=lambda: None, release=lambda: None)
    for _ in range(2):
        worker.commit(3, lambda: snapshot, 0.5)
        worker.writer.drain()
    assert found == [(signal.SIGKILL, ["model.safetensors", "optim.safetensors"])]
    assert worker.checkpoints.steps()[-1] == 3


def test_a_last_commit_that_fails_leaves_no_watchdog(make_worker, monkeypatch):
    worker, _, _ = make_worker()

    def fail():
        raise ShardError("the disk is full")

    monkeypatch.setattr(BlockWorker, "_train", lambda self: self.writer.submit(fail) or "done")
    with pytest.raises(ShardError, match="disk is full"):
        worker.run()
    assert worker.watchdog._closing.is_set()


def test_the_refusal_is_recorded_as_one_that_another_attempt_would_meet_again(make_worker, monkeypatch):
    worker, _, _ = make_worker()
    damage(worker, 1, 2)
    monkeypatch.setattr(BlockWorker, "_train", lambda self: self._resume(None))
    work(worker.assignment, 0, StopRequest())
    end = read_events(worker.log.store)[-1]
    assert (end["event"], end["outcome"], end["retry"]) == ("end", "failed", False)
    assert "all 2 checkpoints" in end["error"]
