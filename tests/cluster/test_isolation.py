"""Blocks are isolated: what one trains does not depend on the others, and no process group spans two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.conftest import CONFIG, TINY, TRAIN, Command, events, shards

pytestmark = pytest.mark.cluster


def test_blocks_are_isolated(undisturbed: Path, expected: dict[str, bytes]) -> None:
    """No process group spans two blocks, and no worker holds more than its own block."""
    ready = [next(e for e in events(undisturbed, block) if e["event"] == "ready") for block in range(3)]
    assert [e["world_size"] for e in ready] == [1, 1, 1]
    held = [sum(t.numel() for t in load(expected[f"0{block}/model.safetensors"]).values()) for block in range(3)]
    assert [e["parameters"] for e in ready] == held


def test_every_command_reads_a_finished_run(undisturbed: Path) -> None:
    """And training it again trains nothing."""
    run = "runs/run"
    attempts = list(undisturbed.glob("blocks/*/attempts/*"))
    folder = undisturbed.parents[1]

    def all_end(code: int, *asked: list[str]) -> str:
        commands = [Command(folder, arguments) for arguments in asked]
        for command in commands:
            assert command.wait() == code, command.output()
        return " ".join(" ".join(command.output().split()) for command in commands)

    all_end(0, ["status", run], ["inspect", run], ["inspect", f"{run}/merged"], ["eval", run])
    again = all_end(0, TRAIN)
    assert "placed" not in again and "nothing is left to train: 3 of 3 block(s) were done already" in again
    all_end(0, ["merge", run])
    assert list(undisturbed.glob("blocks/*/attempts/*")) == attempts
    assert list((undisturbed / "trackers").rglob("events.out.tfevents.*"))
    refused = all_end(2, [*TRAIN, "training.optimizer.lr=0.5"])
    assert "training.optimizer.lr: 0.001 in run.json, 0.5 now" in refused


@pytest.mark.long
def test_two_workers_a_block_and_then_one(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    """Two workers under ZeRO 3, then one alone: the block of one worker, to float tolerance.

    That every stage goes on from every other is shown without Ray (tests/resume/test_engine.py).
    """
    common = [*TINY, "blocks=1", "training.steps=20", "training.checkpoint_every=5", "cluster.max_crashes=0"]
    alone = dbtrain("train", CONFIG, "name=run", "out=alone", *common)
    assert alone.wait() == 0, alone.output()
    two = dbtrain(
        "train", CONFIG, "name=run", "out=two", *common, "cluster.workers=2", "training.zero_stage=3",
        faults=[{"block": 0, "step": 13, "kind": "raise"}],
    )  # fmt: skip
    assert two.wait() == 1, two.output()
    rest = dbtrain("train", CONFIG, "name=run", "out=two", *common)
    assert rest.wait() == 0, rest.output()
    told = events(tmp_path / "two/run", 0)
    assert [e["step"] for e in told if e["event"] == "resumed"] == [10]
    assert [(e["world_size"], e["zero_stage"]) for e in told if e["event"] == "ready"] == [(2, 3), (1, 0)]
    expected, found = (shards(tmp_path / out / "run", 20)["00/model.safetensors"] for out in ("alone", "two"))
    for name, tensor in load(expected).items():
        torch.testing.assert_close(load(found)[name], tensor, rtol=1e-4, atol=1e-5)


def test_bad_input_is_one_line_and_a_code(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    cases = {
        "model.dpeth=3": "did you mean model.depth?",
        "cluster.device=cuda": "none of the 1 nodes has a GPU",
        "cluster.cpus_per_worker=999": "fits on no empty cluster",
    }
    commands = {override: dbtrain("plan", CONFIG, "noise.ranges=uniform", override) for override in cases}
    for override, expected in cases.items():
        command = commands[override]
        assert command.wait() in (1, 2)
        output = " ".join(command.output().split())
        assert expected in output, output
        assert "Traceback" not in output
