"""How a run that branches begins: in several places, when it is asked to stop, and under ZeRO 3."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.cluster.test_branch import RUN
from tests.conftest import CONFIG, ROOT, TINY, Command, shards, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.fault]


def test_places_get_the_branch_with_the_folder(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    """Each would train another on other hardware: a place without the branch trains no block."""

    def say(code: int, *arguments: str) -> str:
        command = dbtrain(*arguments)
        assert command.wait() == code, command.output()
        return " ".join(command.output().split())

    say(0, "prepare", *RUN[1:])
    assert "the branch that every block starts from is not trained" in say(2, "train", "runs/run", "--blocks", "1")
    first = say(0, "train", "runs/run", "--blocks", "branch")
    assert "branch: done at step 25" in first and "block 0: attempt" not in first
    shutil.copytree(tmp_path / "runs/run", tmp_path / "elsewhere/run")
    told = say(0, "train", "elsewhere/run", "--blocks", "1")
    assert "block 1: done at step 20" in told and "block 0: attempt" not in told
    places = [re.search(r"place (\S+);", text)[1] for text in (first, told)]  # type: ignore[index]
    assert places[0] != places[1]
    assert "has no branch" in say(2, "train", CONFIG, "name=other", *TINY, "--blocks", "branch")


def test_a_command_that_is_asked_to_stop_says_that_the_branch_goes_on(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    run = tmp_path / "runs/run"
    first = dbtrain(*RUN, "training.steps=400", "init.branch.steps=4000")
    wait_for(lambda: (run / "branch/blocks/00/step_00000010/COMMIT.json").exists(), 240, "the branch's first commit")
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait() != 0
    told = " ".join(first.output().split())
    assert "no block has begun. branch stopped at step" in told, told
    assert not list(run.glob("blocks/*/attempts"))


def test_every_block_starts_from_the_branch_in_a_masked_language_model(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    """At a rate of next to nothing the blocks stay what they started as: the branch's weights under their own names."""
    config = str(ROOT / "configs/masked_tiny.yaml")
    size = ["blocks=2", "model.depth=4", "model.dim=22", "model.heads=1", "data.length=13", "training.batch_size=9"]
    shared = ["cluster.workers=3", "training.zero_stage=3", "cluster.cpus_per_worker=0.3"]  # no width divides by three
    command = dbtrain(
        "train", config, "name=run", *size, *shared, "training.steps=1", "init.branch.steps=9", "training.ema=0",
        "training.blocks={0: {lr: 1.0e-30}, 1: {lr: 1.0e-30}}",
    )  # fmt: skip
    assert command.wait() == 0, command.output()
    run = tmp_path / "runs/run"
    branch = load(shards(run / "branch", 9)["00/model.safetensors"])
    for block in range(2):
        mine = load(shards(run, 1)[f"0{block}/model.safetensors"])
        assert len(mine) == len(branch)
        for name, tensor in branch.items():
            group, number, rest = name.split(".", 2)
            own = f"layers.{int(number) + 2 * block}.{rest}" if group == "layers" else f"blocks.{block}.{rest}"
            torch.testing.assert_close(mine[own], tensor, rtol=0, atol=1e-20)
            assert name in ("blocks.0.stem.level.network.0.bias",) or tensor.abs().max() > 1e-5, name
