"""Kill it in every way: the final shards are bitwise those of an undisturbed run, and other blocks lose no step."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, Command, events, shards, wait_for

CONFIG = str(ROOT / "configs" / "vit_digits.yaml")
STEPS = 60
BLOCKS = ["blocks=2", "cluster.cpus_per_worker=0.5"]

pytestmark = [pytest.mark.fault, pytest.mark.cluster]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(folder, ["train", CONFIG, "name=run", *BLOCKS, *TINY])
    assert command.wait() == 0, command.output()
    found = shards(folder / "runs" / "run", STEPS)
    assert len(found) == 6  # two blocks of model, ema and optim
    return found


def steps_done_twice(run: Path, block: int) -> int:
    """Steps that a block did more than once, by its own events."""
    done = [e["steps"] for e in events(run, block) if e["event"] == "step"]
    return sum(done) - STEPS


@pytest.mark.parametrize("kind", ["kill", "raise", "memory", "kill_in_commit", "term"])
def test_a_worker_that_dies_comes_back_bitwise_equal(
    kind: str, dbtrain: Callable[..., Command], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    step = 30 if kind == "kill_in_commit" else 33
    command = dbtrain("train", CONFIG, "name=run", *BLOCKS, *TINY, faults=[{"block": 1, "step": step, "kind": kind}])
    assert command.wait() == 0, command.output()
    run = tmp_path / "runs" / "run"
    assert shards(run, STEPS) == undisturbed
    assert [p.name for p in run.glob("blocks/01/faults/*") if not p.name.startswith(".")] == [f"{kind}-{step}"]
    assert len(list(run.glob("blocks/00/attempts/*"))) == 1
    assert len(list(run.glob("blocks/01/attempts/*"))) == 2
    assert steps_done_twice(run, 0) == 0
    # at most a commit interval is done again; a warning loses nothing
    assert steps_done_twice(run, 1) == (0 if kind == "term" else steps_done_twice(run, 1))
    resumed = [e["step"] for e in events(run, 1) if e["event"] == "resumed"]
    assert resumed == [{"term": resumed[0], "kill_in_commit": 20}.get(kind, 30)]
    state = json.loads((run / "blocks/01/state.json").read_text())
    assert (state["preemptions"], state["crashes"]) == ((1, 0) if kind == "term" else (0, 1))


def test_a_worker_killed_from_outside(
    dbtrain: Callable[..., Command], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run = tmp_path / "runs" / "run"
    slow = ["training.checkpoint_every=10"]
    command = dbtrain("train", CONFIG, "name=run", *BLOCKS, *TINY, *slow)
    wait_for(lambda: any(e["event"] == "commit" for e in events(run, 0)), 120, "a commit of block 0")
    pid = next(e["pid"] for e in events(run, 0) if e["event"] == "start")
    os.kill(pid, signal.SIGKILL)
    assert command.wait() == 0, command.output()
    assert shards(run, STEPS) == undisturbed


def test_the_driver_dies_and_the_same_command_continues(
    dbtrain: Callable[..., Command], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run = tmp_path / "runs" / "run"
    arguments = ["train", CONFIG, "name=run", *BLOCKS, *TINY]
    command = dbtrain(*arguments)
    wait_for(lambda: any(e["event"] == "commit" for e in events(run, 1)), 120, "a commit of block 1")
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait(30)
    again = dbtrain(*arguments)
    assert again.wait() == 0, again.output()
    assert shards(run, STEPS) == undisturbed


def test_ctrl_c_commits_and_the_same_command_continues(
    dbtrain: Callable[..., Command], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run = tmp_path / "runs" / "run"
    arguments = ["train", CONFIG, "name=run", *BLOCKS, *TINY]
    command = dbtrain(*arguments, faults=[{"block": 0, "step": 20, "kind": "slow"}])
    wait_for(lambda: any(e["event"] == "step" for e in events(run, 0)), 120, "a step of block 0")
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does: to the command and all that it started
    assert command.wait() == 1, command.output()
    assert "The same command continues" in command.output()
    assert "Traceback" not in command.output()
    again = dbtrain(*arguments)
    assert again.wait() == 0, again.output()
    assert shards(run, STEPS) == undisturbed
    assert steps_done_twice(run, 0) == 0
    assert steps_done_twice(run, 1) == 0


def test_a_second_coordinator_is_refused(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    first = dbtrain("train", CONFIG, "name=run", *BLOCKS, *TINY)
    wait_for(lambda: (run / "LOCK.json").exists(), 60, "the lock")
    second = dbtrain("train", CONFIG, "name=run", *BLOCKS, *TINY)
    assert second.wait() == 1
    assert "dbtrain train run" in second.output()
    assert "wait for it or stop it" in second.output()
    assert "Traceback" not in second.output()
    assert first.wait() == 0, first.output()


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optim.safetensors", "COMMIT.json"])
def test_a_flipped_bit_is_skipped_for_the_commit_before(
    file: str, dbtrain: Callable[..., Command], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run = tmp_path / "runs" / "run"
    arguments = ["train", CONFIG, "name=run", *BLOCKS, *TINY, "cluster.max_crashes=0"]
    command = dbtrain(*arguments, faults=[{"block": 1, "step": 45, "kind": "raise"}])
    assert command.wait() == 1
    assert "1 of 2 blocks are done" in command.output()
    path = run / "blocks" / "01" / "step_00000040" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    again = dbtrain(*arguments)
    assert again.wait() == 0, again.output()
    assert any(e["event"] == "skipped" for e in events(run, 1))
    assert next(e["step"] for e in events(run, 1) if e["event"] == "resumed") == 30
    assert shards(run, STEPS) == undisturbed


def test_a_block_whose_loss_explodes_fails_alone(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    command = dbtrain("train", CONFIG, "name=run", *BLOCKS, *TINY, faults=[{"block": 1, "step": 23, "kind": "nan"}])
    assert command.wait() == 1
    output = " ".join(command.output().split())
    assert "the loss of step 24 is nan" in output
    assert "1 of 2 blocks are done" in output
    assert "Traceback" not in output
    assert sorted(p.name for p in run.glob("blocks/01/step_*")) == ["step_00000010", "step_00000020"]
    assert len(shards(run, STEPS)) == 3
