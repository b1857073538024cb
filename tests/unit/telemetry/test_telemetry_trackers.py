"""Real trackers write their real files; a tracker that fails is made."""

import os
import time
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dbtrain.errors import ConfigError, ShardError
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry import trackers
from dbtrain.telemetry.identity import tracked_as
from dbtrain.telemetry.trackers import Trackers
from tests.unit.telemetry.wandb_files import offline_runs

CONFIG = {"training": {"steps": 40}, "name": "toy"}
STEPS = range(5, 45, 5)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a run's directory, where no tracker reaches the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    for name in list(os.environ):
        if name.startswith("WANDB_") and name != "WANDB_MODE":
            monkeypatch.delenv(name)
    run = Store(tmp_path / "runs" / "toy")
    run.makedirs()
    yield run
    wandb.teardown()  # or it keeps writing to the first test's folder


def step(step, block):
    values = {"loss": step + block / 10, "lr": 0.1 / step, "grad_norm": 2.0 * step}
    return {"event": "step", "step": step, "memory": 7, "seconds": 2.0, "steps": 5, **values}


def command(run, name, sequence, committed=None, **config):
    """What one command logs: blocks and steps as they come."""
    time.sleep(1.1)  # W&B names a folder by the second and the run, and no two commands are so near
    told = []
    made = Trackers([name], told.append)
    made.start(run, "toy", "project", {**CONFIG, **config}, committed or {"block0": 0, "block1": 0, "block2": 0})
    for block, at in sequence:
        made.log(f"block{block}", step(at, block))
    made.close()
    assert told == []


def written(folder):
    wandb.teardown()  # only the end of its process waits until all is written
    return offline_runs(folder)


def test_losses_on_validation_samples_are_tracked_once_each(here):
    made = Trackers(["tensorboard"], pytest.fail)
    made.start(here, "toy", "project", CONFIG, {"block0": 0})
    for at in (5, 10, 5, 10, 15):  # an attempt repeats two
        made.log("block0", step(at, 0))
        made.log("block0", {"event": "validation", "step": at, "loss": at / 2, "weights": "ema", "seconds": 0.1})
    made.close()
    found = EventAccumulator(str(next(here.path.glob("trackers/*/block0"))))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("validation_loss")] == [(5, 2.5), (10, 5.0), (15, 7.5)]


ONE_AFTER_THE_OTHER = [(block, at) for block in range(3) for at in STEPS]
TOGETHER_AND_KILLED = [(0, 5), (1, 5), (0, 10), (0, 15), (0, 10), (0, 15), (2, 5), (0, 20), (1, 10), (2, 10)]
"""Block 0's worker was killed after step 15 and comes back from its commit at step 5."""
CONTINUED = [(block, at) for at in STEPS for block in range(3) if at > {0: 10, 1: 5, 2: 10}[block]]


def test_wandb_keeps_every_point_of_every_block(here, tmp_path):
    command(here, "wandb", ONE_AFTER_THE_OTHER)
    runs = written(tmp_path)
    assert sorted(run["name"] for run in runs.values()) == ["toy-block0", "toy-block1", "toy-block2"]
    for run in runs.values():
        block = int(run["name"][-1])
        assert run["group"] == "toy" and run["axis"]["*"] == "step"
        assert [row["step"] for row in run["rows"]] == list(STEPS)
        assert [row["loss"] for row in run["rows"]] == [at + block / 10 for at in STEPS]
        assert [row["grad_norm"] for row in run["rows"]] == [2.0 * at for at in STEPS]
        assert [row["lr"] for row in run["rows"]] == [0.1 / at for at in STEPS]
        assert run["config"]["training.steps"] == 40 and run["config"]["part"] == f"block{block}"


def test_wandb_goes_on_in_the_same_runs_after_a_kill_and_in_the_next_command(here, tmp_path):
    command(here, "wandb", TOGETHER_AND_KILLED)
    command(here, "wandb", CONTINUED, {"block0": 10, "block1": 5, "block2": 10}, workers=2)
    runs = written(tmp_path)
    assert len(runs) == 3
    for run in runs.values():
        found = {row["step"]: row["loss"] for row in run["rows"]}
        assert sorted(found) == list(STEPS)
        assert len(run["rows"]) <= len(STEPS) + 2, "only what came after the last commit comes twice"


def test_a_run_that_was_removed_and_begun_anew_is_another_in_wandb(here, tmp_path):
    command(here, "wandb", [(0, 5)], {"block0": 0})
    (Path(here.url) / "tracked.json").unlink()
    command(here, "wandb", [(0, 5)], {"block0": 0})
    assert len(written(tmp_path)) == 2


def test_tensorboard_overlays_blocks_and_a_continued_command_takes_back_what_it_repeats(here, tmp_path):
    command(here, "tensorboard", TOGETHER_AND_KILLED)
    command(here, "tensorboard", CONTINUED, {"block0": 10, "block1": 5, "block2": 10})
    folder = tmp_path / "runs/toy/trackers/project"
    assert sorted(path.name for path in folder.iterdir()) == ["block0", "block1", "block2"]
    for block in range(3):
        series = EventAccumulator(str(folder / f"block{block}")).Reload()
        for tag, value in (("loss", lambda at, b=block: at + b / 10), ("grad_norm", lambda at: 2.0 * at)):
            points = [(point.step, point.value) for point in series.Scalars(tag)]
            assert points == [(at, pytest.approx(value(at))) for at in STEPS]


def test_mlflow_has_one_run_with_all_points_of_all_blocks(here):
    import mlflow

    command(here, "mlflow", TOGETHER_AND_KILLED)
    command(here, "mlflow", CONTINUED, {"block0": 10, "block1": 5, "block2": 10}, workers=2)
    (run,) = mlflow.search_runs(experiment_names=["project"], output_format="list")
    assert run.info.run_name == "toy" and run.data.params["training.steps"] == "40"
    for block in range(3):
        points = mlflow.MlflowClient().get_metric_history(run.info.run_id, f"block{block}/loss")
        assert sorted({(point.step, point.value) for point in points}) == [(at, at + block / 10) for at in STEPS]


def test_a_tracker_without_its_package_is_a_users_mistake(here, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ConfigError, match="telemetry.trackers: mlflow does not start.*install or configure it"):
        Trackers(["mlflow"], print).start(here, "toy", "project", CONFIG, {"block0": 0})


def test_nothing_is_started_where_no_block_is_left_to_train(here, tmp_path):
    Trackers(["tensorboard"], print).start(here, "toy", "project", CONFIG, {})
    assert not list(tmp_path.rglob("*tfevents*")) and not here.exists("tracked.json")


@pytest.mark.parametrize("text", [b"[]", b'{"identity": 3}', b'{"identity": "../x"}'])
def test_an_identity_that_is_none_is_named(here, text):
    here.write("tracked.json", text)
    with pytest.raises(ShardError, match="tracked.json"):
        tracked_as(here)


class Kept:
    """Keeps what it is called for, and fails in what it is told to fail in."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def _call(self, name):
        self.calls.append(name)
        if name in self.fails:
            raise OSError("no space\nleft")

    def start(self, tracked):
        self._call("start")
        return self

    def log(self, block, at, values):
        self._call("log")

    def close(self):
        self._call("close")


@pytest.fixture
def two(here, monkeypatch):
    def go(*fails):
        bad, good, told = Kept(fails), Kept(), []
        monkeypatch.setattr(trackers, "SERIES", {"good": good.start, "bad": bad.start})
        made = Trackers(["good", "bad"], told.append)
        return made, bad, good, told

    return go


@pytest.mark.parametrize(("fails", "calls"), [("log", ["log"]), ("close", ["log", "log", "close"])])
def test_a_tracker_that_fails_is_told_once_and_given_up_and_the_others_go_on(here, two, fails, calls):
    made, bad, good, told = two(fails)
    made.start(here, "toy", "project", CONFIG, {"block0": 0})
    made.log("block0", {"event": "commit", "step": 1})
    for at in (1, 2):
        made.log("block0", step(at, 0))
    made.close()
    assert bad.calls == ["start", *calls] and good.calls == ["start", "log", "log", "close"]
    assert len(told) == 1 and "bad fails and gets no more (OSError: no space left)" in told[0]


def test_a_tracker_that_refuses_to_start_is_a_users_mistake_and_those_before_it_are_closed(here, two):
    made, _, good, _ = two("start")
    with pytest.raises(ConfigError, match="bad does not start .OSError: no space left."):
        made.start(here, "toy", "project", CONFIG, {"block0": 0})
    assert good.calls == ["start", "close"]
