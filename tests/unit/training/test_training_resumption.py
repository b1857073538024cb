"""Several workers of a block resume from one checkpoint, whatever the shared storage shows each of them."""

from types import SimpleNamespace

import pytest
import torch

from dbtrain.errors import FirstWorkerError, ShardError, WorkerError
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.telemetry.events import EventLog
from dbtrain.training import resumption
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import work
from dbtrain.training.resumption import Resumption
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker


class Line:
    """Between the first worker and another one, which asks after it."""

    workers = 2

    def __init__(self):
        self.said = []

    def from_first(self, said):
        self.said.append(said)
        return self.said[0]


@pytest.fixture
def block(make_run, monkeypatch):
    """Checkpoints of steps 1 and 2 as each of two workers sees them, and what lies between the two."""
    monkeypatch.setattr(resumption, "LOOK_S", 0.01)
    _, run = make_run()
    store = run.child("blocks", "01")
    identity = BlockWorker(
        Assignment(run.url, 1, 1, "mine", "s", 2, None, "cpu", 1, 60.0), 0, StopRequest(), EventLog(store)
    ).identity
    views = [Checkpoints(store, identity) for _ in range(2)]
    for step in (1, 2):
        write(views[0], step, step)
    return SimpleNamespace(store=store, views=views, line=Line(), identity=identity, run=run)


def write(checkpoints, step, value):
    parts = {"model": {"blocks.1.stem.w": torch.full((2,), float(value))}}
    checkpoints.commit(step, parts, loss=0.5, attempt=1, fence=lambda: None)


def hide(monkeypatch, checkpoints, *steps):
    """From a listing that is some seconds old."""
    listing = checkpoints.steps
    monkeypatch.setattr(checkpoints, "steps", lambda: [step for step in listing() if step not in steps])


def damage(block, *steps):
    for step in steps:
        path = block.store.path / f"step_{step:08d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")


def find(block, rank, patience=0.05, restart_damaged=False):
    loaded = Resumption(block.views[rank], block.line, 1, restart_damaged, patience).find(rank, lambda line: None)
    return None if loaded is None else (loaded.step, float(loaded.parts["model"]["blocks.1.stem.w"][0]))


def test_both_take_the_newest(block):
    assert find(block, 0) == find(block, 1) == (2, 2.0)
    assert len({len(said) for said in block.line.said}) == 1  # as a collective wants it


def test_a_worker_with_an_old_listing_takes_the_step_of_the_first_one(block, monkeypatch):
    hide(monkeypatch, block.views[1], 2)
    assert find(block, 0) == find(block, 1) == (2, 2.0)


def test_a_worker_that_sees_more_than_the_first_one_takes_no_more(block, monkeypatch):
    hide(monkeypatch, block.views[0], 2)
    assert find(block, 0) == find(block, 1) == (1, 1.0)


def test_where_the_first_one_sees_nothing_all_begin_at_the_first_step(block, monkeypatch):
    hide(monkeypatch, block.views[0], 1, 2)
    assert find(block, 0) is None and find(block, 1) is None


def elsewhere(block, monkeypatch, value):
    """The other worker sees a directory of its own, in which step 2 holds this."""
    far = Checkpoints(block.run.child("elsewhere"), block.identity)
    write(far, 1, 1)
    if value is not None:
        write(far, 2, value)
    block.views[1] = far
    return far


@pytest.mark.parametrize(("value", "seen"), [(None, "does not exist"), (3, "another checkpoint of that step")])
def test_a_worker_that_never_sees_it_ends_the_attempt_with_what_it_sees(block, monkeypatch, value, seen):
    elsewhere(block, monkeypatch, value)
    assert find(block, 0) == (2, 2.0)
    with pytest.raises(ShardError, match=f"block 1 resumes from step 2, but worker 1 sees .*{seen}.*tried again"):
        find(block, 1)


def test_a_worker_waits_until_its_listing_catches_up(block, monkeypatch):
    far, looks = elsewhere(block, monkeypatch, None), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            write(far, 2, 2)

    monkeypatch.setattr(resumption.time, "sleep", sleep)
    assert find(block, 0) == find(block, 1, patience=60.0) == (2, 2.0)
    assert len(looks) == 2


def test_what_is_damaged_for_one_worker_alone_is_not_passed_over_by_it(block, monkeypatch):
    elsewhere(block, monkeypatch, 2)
    path = block.run.child("elsewhere").path / "step_00000002" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert find(block, 0) == (2, 2.0)
    with pytest.raises(ShardError, match="worker 1 sees .*is damaged"):
        find(block, 1)


def test_all_go_back_to_the_one_before_where_the_newest_is_damaged(block):
    damage(block, 2)
    assert find(block, 0) == find(block, 1) == (1, 1.0)


def test_the_others_hear_that_the_first_one_failed_and_leave_the_word_to_it(block):
    damage(block, 1, 2)
    with pytest.raises(WorkerError, match="all 2 checkpoints of block 1"):
        find(block, 0)
    with pytest.raises(FirstWorkerError):
        find(block, 1)


def test_all_begin_anew_when_asked(block):
    damage(block, 1, 2)
    assert find(block, 0, restart_damaged=True) is None and find(block, 1) is None


def test_a_worker_alone_asks_nobody(block):
    block.line.workers = 1
    assert find(block, 0) == (2, 2.0) and block.line.said == []


def test_a_worker_whose_first_one_failed_ends_without_a_word(block, monkeypatch):
    def fail(worker):
        raise FirstWorkerError("the first one says why")

    monkeypatch.setattr(BlockWorker, "run", fail)
    work(Assignment(block.run.url, 1, 1, "mine", "s", 2, None, "cpu", 1, 60.0), 1, StopRequest())
    assert not block.store.child("attempts", "1").list()
