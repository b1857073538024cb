"""Blocks are isolated: what one trains does not depend on the others, and no process group spans two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.conftest import ROOT, TINY, Command, events, shards

CONFIG = str(ROOT / "configs" / "vit_digits.yaml")
STEPS = 60

pytestmark = pytest.mark.cluster


def test_the_main_job_and_a_block_alone(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    """Side by side, queued one after the other, and restarted alone: the same bits."""
    beside = dbtrain("train", CONFIG, "name=run", "out=beside", "blocks=3", "cluster.cpus_per_worker=0.5", *TINY)
    assert beside.wait() == 0, beside.output()
    # on two cores one block at a time; the whole part is the number of threads, on which the last bits depend
    queued = dbtrain("train", CONFIG, "name=run", "out=queued", "blocks=3", "cluster.cpus_per_worker=1.1", *TINY)
    assert queued.wait() == 0, queued.output()
    one, two = (shards(tmp_path / out / "run", STEPS) for out in ("beside", "queued"))
    assert len(one) == 9
    assert one == two
    run = tmp_path / "beside" / "run"
    ready = [next(e for e in events(run, block) if e["event"] == "ready") for block in range(3)]
    # no process group spans two blocks, and no worker holds more than its own block
    assert [e["world_size"] for e in ready] == [1, 1, 1]
    held = [sum(t.numel() for t in load(one[f"0{block}/model.safetensors"]).values()) for block in range(3)]
    assert [e["parameters"] for e in ready] == held
    for run in ("beside/run",):
        for command in (["status", run], ["inspect", run], ["inspect", f"{run}/merged"], ["eval", run], ["merge", run]):
            done = dbtrain(*command)
            assert done.wait() == 0, done.output()


def test_a_finished_run_is_not_trained_again(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    arguments = ["train", CONFIG, "name=run", "blocks=1", *TINY, "training.steps=10"]
    assert dbtrain(*arguments, "telemetry.trackers=[tensorboard]").wait() == 0
    assert list((tmp_path / "runs/run/trackers").rglob("events.out.tfevents.*"))
    again = dbtrain(*arguments)
    assert again.wait() == 0
    assert "placed" not in again.output()
    assert len(list((tmp_path / "runs/run/blocks/00/attempts").iterdir())) == 1
    other = dbtrain(*arguments, "training.optimizer.lr=0.5")
    assert other.wait() == 2
    assert "training.optimizer.lr=0.001 there, 0.5 here" in " ".join(other.output().split())


@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_a_block_and_resume_on_one(stage: int, dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    """A block trained by two workers under ZeRO goes on alone under ZeRO 0, to float tolerance of one worker's."""
    common = [*TINY, "blocks=1", "training.steps=20"]
    alone = dbtrain("train", CONFIG, "name=run", "out=alone", *common)
    assert alone.wait() == 0, alone.output()
    two = dbtrain(
        "train", CONFIG, "name=run", "out=two", *common, "cluster.workers=2", f"training.zero_stage={stage}",
        "cluster.max_crashes=0", faults=[{"block": 0, "step": 13, "kind": "raise"}],
    )  # fmt: skip
    assert two.wait() == 1, two.output()
    rest = dbtrain("train", CONFIG, "name=run", "out=two", *common)
    assert rest.wait() == 0, rest.output()
    expected, found = (shards(tmp_path / out / "run", 20)["00/model.safetensors"] for out in ("alone", "two"))
    for name, tensor in load(expected).items():
        torch.testing.assert_close(load(found)[name], tensor, rtol=1e-4, atol=1e-5)


def test_bad_input_is_one_line_and_a_code(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    cases = {
        "model.dpeth=3": "did you mean depth?",
        "blocks=7": "blocks=7 cannot share 6 layers",
        "cluster.device=cuda": "none of the 1 nodes has a GPU",
        "cluster.cpus_per_worker=999": "fits on no empty cluster",
        "data.source=nope": "'digits', 'fashion_mnist', 'idx', 'hf'",
        "model.patch=3": "does not divide",
        "training.micro_batch=7": "does not divide a worker's share",
    }
    for override, expected in cases.items():
        command = dbtrain("plan", CONFIG, override)
        assert command.wait() in (1, 2)
        output = " ".join(command.output().split())
        assert expected in output, output
        assert "Traceback" not in output
