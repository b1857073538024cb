"""What a worker tells, hears and waits for between its steps, without an engine."""

import threading
from types import SimpleNamespace

import pytest
import torch

from dbtrain.errors import ShardError, WorkerError
from dbtrain.run.continued import longer
from dbtrain.run.extend import extend
from dbtrain.run.run import Run
from dbtrain.shards.storage.fence import claim
from dbtrain.telemetry.events import EventLog, read_events
from dbtrain.training import worker_sync as sync
from dbtrain.training.assignment import Assignment
from dbtrain.training.loop import Report
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker
from tests.unit.small_runs import commit, settled


def snapshot_of(parts, released=None):
    """What an engine's `snapshot` would give."""
    held = SimpleNamespace(parts=parts, wait=lambda: None, release=lambda: released is None or released.append(1))
    return lambda: held


@pytest.fixture
def make_worker(make_run):
    def make(workers=1, rank=0, overrides=()):
        _, run = make_run(*overrides)
        store = run.child("blocks", "01")
        claim(store, 1, "mine")
        told = Assignment(run.url, 1, 1, "mine", "session", workers, None, "cpu", 1, 60.0)
        return BlockWorker(told, rank, StopRequest(), EventLog(store.child("attempts", "1"), rank))

    return make


def test_an_outage_of_the_storage_is_met_by_a_commit_and_by_nothing_before(make_worker, monkeypatch):
    worker = make_worker()
    append = worker.log.store.append

    def refuse(name, data):
        raise ShardError("the storage does not answer")

    monkeypatch.setattr(worker.log.store, "append", refuse)
    worker.progress(1, Report(0.5, 1.0, 1, 0.1, 2.5))
    worker.stop.request("SIGTERM")
    assert worker.should_stop(1)
    released = []
    worker.commit(1, snapshot_of({"model": {"model.stem.w": torch.ones(2)}}, released), 0.5)
    worker.writer.drain()
    assert released == [1]
    assert worker.checkpoints.steps() == [1]
    monkeypatch.setattr(worker.log.store, "append", append)
    worker.progress(2, Report(0.5, 1.0, 1, 0.1, None))
    told = read_events(worker.log.store)
    assert [event["event"] for event in told] == ["step", "stopping", "commit", "step"]
    assert told[0]["lr"] == 0.1 and told[0]["grad_norm"] == 2.5 and "grad_norm" not in told[-1]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_several_workers_stop_after_the_step_in_which_any_of_them_was_asked(make_worker, monkeypatch, own, others):
    worker, calls = make_worker(workers=2), []

    def all_reduce(shared):  # of another worker, whose loss is 3
        calls.append(1)
        shared += torch.tensor([3.0, float(others)])

    def all_gather(told, sent):
        for into, tensor in zip(told, (sent, reason), strict=True):
            into.copy_(tensor)

    reason = torch.zeros(sync.REASON_BYTES, dtype=torch.uint8)
    if others:
        reason[:7] = torch.tensor(list(b"SIGUSR1"), dtype=torch.uint8)
    monkeypatch.setattr(sync.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(sync.dist, "all_gather", all_gather)
    if own:
        worker.stop.request("SIGTERM")
    for step in (1, 2, 3):
        assert worker.see_loss(step - 1, torch.tensor(1.0)) == 2.0
        assert worker.should_stop(step) is (own or bool(others))
    assert len(calls) == 3  # one collective a step
    # the first rank tells why, also when only another one knows
    wanted = "SIGTERM" if own else "SIGUSR1" if others else None
    assert worker.stop.reason == wanted
    told = [event["reason"] for event in read_events(worker.log.store) if event["event"] == "stopping"]
    assert told == ([wanted] if wanted else [])


def test_a_loss_that_is_no_number_is_no_request_to_stop(make_worker, monkeypatch):
    worker = make_worker(workers=2)
    monkeypatch.setattr(sync.dist, "all_reduce", lambda shared: None)
    assert worker.see_loss(0, torch.tensor(float("nan"))).isnan()
    assert worker.should_stop(1) is False


@pytest.mark.parametrize(("block", "rate"), [(1, 0.5), (2, 0.001)])
def test_a_worker_trains_with_the_exceptions_of_its_own_block(make_worker, block, rate):
    worker = make_worker(overrides=[f"training.blocks.{block}.lr=0.5"])
    assert worker.training.optimizer.lr == rate
    assert worker.training.optimizer.warmup == worker.config.training.optimizer.warmup


def test_a_worker_trains_for_its_blocks_own_steps(make_worker):
    own = "training.blocks.1={steps: 9, batch_size: 3, ema: 0.5}"
    worker = make_worker(overrides=[own, "training.optimizer.warmup=2"])
    assert (worker.training.steps, worker.training.batch_size, worker.training.ema) == (9, 3, 0.5)
    assert worker.training.optimizer.warmup == 4  # of 9 steps, as 2 of 4


def test_a_commit_that_waits_is_dropped_before_the_next_snapshot_takes_its_memory(make_worker, monkeypatch):
    worker, order, begun, gate = make_worker(), [], threading.Event(), threading.Event()
    commit = worker.checkpoints.commit

    def slow(*given, **named):
        begun.set()
        assert gate.wait(60)
        return commit(*given, **named)

    monkeypatch.setattr(worker.checkpoints, "commit", slow)
    released = {step: [] for step in (1, 2, 3)}

    def take(step):
        order.append((step, [len(released[s]) for s in released]))
        return snapshot_of({"model": {"model.stem.w": torch.full((2,), float(step))}}, released[step])()

    for step in (1, 2, 3):
        worker.commit(step, lambda step=step: take(step), 0.5)
        assert begun.wait(60)
    gate.set()
    worker.writer.drain()
    assert order == [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 0])]
    assert worker.checkpoints.steps() == [1, 3] and all(len(times) == 1 for times in released.values())
    assert [e["step"] for e in read_events(worker.log.store) if e["event"] == "commit"] == [1, 3]


ALL = {
    "model": {"model.stem.w": torch.ones(2)},
    "ema": {"model.stem.w": torch.full((2,), 2.0)},
    "optim": {"exp_avg/model.stem.w": torch.zeros(2)},
}


@pytest.mark.parametrize("keep", [True, False])
def test_what_stays_of_a_block_that_is_done(make_worker, keep):
    worker = make_worker(overrides=[f"training.keep_optimizer={str(keep).lower()}", "training.steps=6"])
    for step in (2, 4, 6):
        worker.commit(step, snapshot_of(ALL), 0.5)
        worker.writer.drain()
        if step < 6:
            assert set(worker.checkpoints.newest().parts) == {"model", "ema", "optim"}
    assert worker.checkpoints.steps() == ([4, 6] if keep else [6])
    assert set(worker.checkpoints.newest().parts) == {"model", "ema", *(["optim"] if keep else [])}
    block = worker.of_run.block(1)
    assert worker.checkpoints.verify(6) == [] and block.newest_weights(pytest.fail)[1] == "ema"


def test_what_is_below_stays_when_the_last_commit_reads_back_damaged(make_worker, monkeypatch):
    worker = make_worker(overrides=["training.keep_optimizer=false", "training.steps=6"])
    for step in (2, 4):
        worker.commit(step, snapshot_of(ALL), 0.5)
        worker.writer.drain()
    write = worker.checkpoints.commit

    def damaging(step, *given, **named):
        done = write(step, *given, **named)
        path = worker.store.path / f"step_{step:08d}" / "ema.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        return done

    monkeypatch.setattr(worker.checkpoints, "commit", damaging)
    worker.commit(6, snapshot_of(ALL), 0.5)
    with pytest.raises(ShardError, match="checkpoint 6 of block 1 was written and reads.*flipped bit"):
        worker.writer.drain()
    assert worker.checkpoints.newest(lambda line: None).step == 4


def test_a_worker_after_the_first_takes_part_in_a_snapshot_and_writes_nothing(make_worker):
    worker, released = make_worker(workers=2, rank=1), []
    worker.commit(1, snapshot_of({"model": {}}, released), 0.5)
    worker.writer.drain()
    assert released == [1] and worker.checkpoints.steps() == []


def test_taking_a_snapshot_is_no_hang(make_worker, monkeypatch):
    worker, waits = make_worker(), []
    monkeypatch.setattr(worker.writer, "submit", lambda *job: waits.append(worker.watchdog._touched))
    worker.commit(1, snapshot_of({"model": {"model.stem.w": torch.ones(2)}}), 0.5)
    assert waits == [float("inf")] and worker.watchdog._touched < float("inf")
    assert worker.watchdog.log is worker.log and make_worker(2, rank=1).watchdog.log is None


def test_a_block_without_a_commit_begins_from_the_source_and_another_file_there_ends_it(tmp_path):
    source = settled(tmp_path / "source")
    commit(source)
    new = settled(tmp_path / "new", init={"from": source.url})
    claim(new.child("blocks", "01"), 1, "mine")
    told = Assignment(new.url, 1, 1, "mine", "session", 1, None, "cpu", 1, 60.0)
    worker = BlockWorker(told, 0, StopRequest(), EventLog(new.child("blocks", "01", "attempts", "1"), 0))
    names = [f"model.{name}" for name, _ in worker.run_plan.model(1, "meta").named_parameters()]
    begun = {}
    engine = SimpleNamespace(names=names, begin=lambda weights, where, new: begun.update(weights))
    worker._begin(engine)
    assert begun.keys() == set(names)
    own = worker.of_run.block(1)  # of the new run, which has no commit yet
    assert own.committed == 0
    file = source.path / "blocks/01/step_00000002/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WorkerError, match="block 1 cannot start from init.from: .*or start another run"):
        worker._begin(engine)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_worker_that_need_not_repeat_its_bits_says_so(make_worker, monkeypatch, deterministic):
    overrides = [] if deterministic else ["training.deterministic=false"]
    worker, seen = make_worker(overrides=overrides), []

    def trained():
        seen.append(torch.are_deterministic_algorithms_enabled())
        return "done"

    monkeypatch.setattr(worker, "_train", trained)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # as its process is prepared
    try:
        assert worker.run() == "done"
    finally:
        torch.use_deterministic_algorithms(before)
    notes = [event["reason"] for event in read_events(worker.log.store) if event["event"] == "note"]
    assert seen == [deterministic]
    assert len(notes) == (not deterministic) and all("training.deterministic=false" in note for note in notes)


@pytest.mark.parametrize("method", ["diffusion_blocks", "joint", "end_to_end", "ensemble", "forward_forward"])
def test_blocks_and_baselines_are_trained_by_the_schedule_of_the_plan_extensions_included(make_run, method):
    blocks = ["blocks=1"] if method == "end_to_end" else []
    _, store = make_run(f"method={method}", "training.steps=20", "training.optimizer.warmup=4", *blocks)
    extend(Run(store), longer(store.url, ["training.steps=30"]), lambda line: None)
    claim(store.child("blocks", "00"), 1, "mine")
    told = Assignment(store.url, 0, 1, "mine", "session", 1, None, "cpu", 1, 60.0)
    worker = BlockWorker(told, 0, StopRequest(), EventLog(store.child("blocks", "00", "attempts", "1"), 0))
    assert worker.schedule == Run(store).plan.schedule(0) == Run(store).block(0).schedule
    assert worker.training.steps == worker.schedule.end == 30 and worker.schedule.scale(20) < worker.schedule.scale(22)
