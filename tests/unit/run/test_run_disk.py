"""The disk that a plan names is what checkpoints really take, and too little of it is said before anything trains."""

import shutil
from types import SimpleNamespace

import pytest

from dbtrain.run import disk
from dbtrain.run.make_plan import design
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never

HEADERS = 30_000
"""Bytes of the headers of a checkpoint at most."""


@pytest.fixture
def plan(make_config, digits):
    return lambda *overrides: design(make_config("model.dim=48", *overrides), digits, never)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_checkpoint_is_as_large_as_was_said(plan, make_run, tmp_path, ema):
    run_plan = plan("layers_per_block=[1,2,3]", f"training.ema={ema}")
    _, run = make_run("layers_per_block=[1,2,3]")
    for block in range(3):
        trained = {n: p for n, p in run_plan.objective(block).named_parameters() if p.requires_grad}
        names = {n.removeprefix("model."): p.detach() for n, p in trained.items()}
        held = {n if n.startswith("layers.") else f"blocks.{block}.{n}": p for n, p in names.items()}
        parts = {"model": held, "optim": {f"{s}/{n}": p for s in ("exp_avg", "exp_avg_sq") for n, p in held.items()}}
        if ema:
            parts["ema"] = held
        checkpoints = Checkpoints(Store(tmp_path / f"{block}"), Run(run).block(block).identity)
        done = checkpoints.commit(1, parts, loss=None, attempt=1, fence=lambda: None)
        real = sum(record["size"] for record in done.files.values())
        said = disk.of_block(run_plan, block)
        assert said.checkpoint <= real <= said.checkpoint + HEADERS
        assert said.training == 3 * said.checkpoint and said.done == 2 * said.checkpoint


def test_a_block_that_keeps_no_optimizer_leaves_its_weights_and_averages(plan):
    ema = "training.ema=0.9"
    kept, dropped = (disk.of_block(plan(f"training.keep_optimizer={keep}", ema), 0) for keep in ("true", "false"))
    assert dropped.training == kept.training and dropped.done * 4 == kept.done


def test_the_checkpoint_before_the_decay_takes_room_as_well(plan):
    wsd = ["training.optimizer.schedule=wsd", "training.steps=50", "training.optimizer.warmup=10"]
    said = disk.of_block(plan(*wsd), 0)
    assert said.training == 4 * said.checkpoint and said.done == 3 * said.checkpoint


def test_the_peak_is_that_of_the_largest_blocks_that_train_at_once():
    blocks = [disk.BlockDisk(10, 30, 5), disk.BlockDisk(20, 60, 10), disk.BlockDisk(10, 30, 5)]
    assert disk.peak_and_after(blocks, 1) == (20 + 50, 20)
    assert disk.peak_and_after(blocks, 2) == (20 + 50 + 25, 20)
    assert disk.peak_and_after(blocks, 9) == (120, 20)


@pytest.mark.parametrize("keep", ["true", "false"])
def test_a_disk_that_is_too_small_is_said_with_what_it_lacks(plan, tmp_path, monkeypatch, keep):
    run_plan, run = plan(f"training.keep_optimizer={keep}"), Store(tmp_path / "runs" / "toy")
    peak, _ = disk.peak_and_after([disk.of_block(run_plan, block) for block in range(3)], 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=peak - 1))
    told = disk.shortage(run_plan, run, 3)
    assert len(told) == 1 and "the disk is too small" in told[0] and run.url in told[0] and "\n" not in told[0]
    assert ("training.keep_optimizer=false" in told[0]) == (keep == "true")
    assert told[0] in disk.needs(run_plan, run, 3)
    # what the run holds already is not needed again, and of two names of one file one counts
    run.write("blocks/00/step_00000001/model.safetensors", bytes(10))
    run.copy("blocks/00/step_00000001/model.safetensors", "merged/model-00001-of-00003.safetensors")
    assert disk.shortage(run_plan, run, 3) == [] and disk._held(run.path) == 10


def test_an_object_store_has_no_end(plan):
    run_plan = plan()
    assert disk.shortage(run_plan, Store("memory://disk/run"), 3) == []
    assert len(disk.needs(run_plan, Store("memory://disk/run"), 3)) == 2
