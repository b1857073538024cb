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
    EventLog(store.child("attempts", "1"), 0).tell("start", rank=0, pid=123, host="there", device="cpu")
    with RunLock(run, "dbtrain train"):
        assert [block.worker for block in status(Run(run))] == [None, "pid 123 on there", None]
        assert preparation(Run(run)) is None
    assert [block.worker for block in status(Run(run))] == [None, None, None]


def test_a_wrong_path_is_not_sent_to_merge(make_run, tmp_path):
    with pytest.raises(ShardError, match="not a run directory"):
        evaluate_run(Run(Store(tmp_path / "nowhere")))
    with pytest.raises(ShardError, match="run the merge first"):
        evaluate_run(Run(make_run()[1]))


def test_a_damaged_checkpoint_is_told_by_the_exit_code_too(make_run, monkeypatch, capsys):
    _, run = make_run()
    inspect_path(run.url, make_console())
    monkeypatch.setattr("dbtrain.shards.checkpoint.Checkpoints.steps", lambda self: [7])
    with pytest.raises(ShardError, match="3 checkpoint.s. of .* damaged"):
        inspect_path(run.url, make_console())
    assert "7" in capsys.readouterr().out
