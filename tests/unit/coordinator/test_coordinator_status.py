"""What `status` says of a run besides its blocks' progress."""

import os

import pytest

from dbtrain.coordinator.lifecycle import Phase
from dbtrain.coordinator.status import preparation, status
from dbtrain.errors import ShardError
from dbtrain.evaluation.inspect import inspect_path
from dbtrain.evaluation.report import evaluate_run
from dbtrain.run.run import Run
from dbtrain.shards.storage.lock import RunLock
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.console import make_console
from dbtrain.telemetry.events import EventLog
from tests.unit.run import carried


def test_a_run_that_is_being_prepared_is_told_from_a_wrong_path(tmp_path):
    store = Store(tmp_path / "run")
    assert preparation(Run(store)) is None
    with RunLock(store, "dbtrain train"):
        assert f"prepared by pid {os.getpid()} on" in preparation(Run(store))
    assert preparation(Run(store)) is None
    with pytest.raises(ShardError, match="not a run directory"):
        status(Run(store))


def test_a_block_that_trains_names_its_worker_process(make_run):
    _, run = make_run()
    store = run.child("blocks", "01")
    store.write_json("state.json", {"phase": Phase.RUNNING.value, "since": 0.0, "error": None})
    log = EventLog(store.child("attempts", "1"), 0)
    log.tell("start", rank=0, pid=123, host="there", device="cpu")  # as an older version told it
    with RunLock(run, "dbtrain train"):
        assert [block.worker for block in status(Run(run))] == [None, "pid 123 on there", None]
        # of several nodes of one host it is named as `plan`, `doctor` and `ray list nodes` name it
        log.tell("start", rank=0, pid=123, host="there", node="3f9abcde01", address="10.0.0.7", device="cpu")
        assert status(Run(run))[1].worker == "pid 123 on there#3f9a (10.0.0.7)"
        assert preparation(Run(run)) is None
    assert [block.worker for block in status(Run(run))] == [None, None, None]


def test_a_wrong_path_is_not_sent_to_merge(make_run, tmp_path):
    with pytest.raises(ShardError, match="not a run directory"):
        evaluate_run(Run(Store(tmp_path / "nowhere")))
    with pytest.raises(ShardError, match="run the merge first"):
        evaluate_run(Run(make_run()[1]))


def test_a_branch_that_was_removed_when_no_block_needed_it_any_more_is_not_pending(make_run):
    _, run = make_run("blocks=2", "model.depth=2", "init.branch.steps=3")
    assert [block.row.name for block in status(Run(run))] == ["branch", "block 0", "block 1"]
    for block in Run(run).blocks:
        carried.commit(Run(run), block.number, 4)
    assert [block.row.name for block in status(Run(run))] == ["block 0", "block 1"]


def damage(run, block, step):
    path = run.block(block).store.path / f"step_{step:08d}/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_advice_for_a_damaged_checkpoint_depends_on_whether_another_is_whole(make_run):
    run = Run(make_run()[1])
    for step in (2, 4):
        carried.commit(run, 1, step)
    carried.commit(run, 2, 4)  # as training.keep_optimizer=false leaves a block that is done
    damage(run, 1, 4)
    with pytest.raises(ShardError, match="1 checkpoint.s. of .*: .* train their blocks on from the ones before"):
        inspect_path(run.store.url, make_console())
    damage(run, 2, 4)
    with pytest.raises(ShardError) as error:
        inspect_path(run.store.url, make_console())
    assert "for of block(s) 2 no other is whole" in str(error.value)
    assert f"dbtrain train {run.store.url} cluster.restart_damaged=true" in str(error.value)


def test_a_damaged_checkpoint_is_told_by_the_exit_code_too(make_run, monkeypatch, capsys):
    _, run = make_run()
    inspect_path(run.url, make_console())
    monkeypatch.setattr("dbtrain.shards.checkpoint.Checkpoints.steps", lambda self: [7])
    with pytest.raises(ShardError, match="3 checkpoint.s. of .* damaged"):
        inspect_path(run.url, make_console())
    assert "7" in capsys.readouterr().out
