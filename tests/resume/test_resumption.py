"""Two real workers of one block resume from one checkpoint, though the shared storage shows them different ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dbtrain.config import load_config
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import read_events
from tests.conftest import CONFIG, ROOT, TINY

pytestmark = [pytest.mark.fault, pytest.mark.timeout(300)]

STEPS, CUT = 20, 10
OWN = [f"training.steps={STEPS}", "training.checkpoint_every=5", "training.keep=4", "training.optimizer.warmup=5"]


def never(*_: object) -> None:
    raise AssertionError("nothing here needs a calibration")


def attempt(run: Path, number: int, hidden: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(ROOT / "tests/resume/two_workers.py"), str(run), str(number), str(hidden)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run whose block 0 nothing happened to."""
    folder = tmp_path_factory.mktemp("two")
    config = load_config(CONFIG, [*TINY, *OWN, "name=whole", f"out={folder}", "blocks=2", "cluster.workers=2"])
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)  # type: ignore[arg-type]
    done = attempt(run.path, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return run.path


def test_a_block_that_is_measured_has_the_bits_of_one_that_is_not(whole: Path) -> None:
    config = ["name=measured", f"out={whole.parent}", "blocks=2", "cluster.workers=2", "training.validate_every=3"]
    run = Store(load_config(CONFIG, [*TINY, *OWN, *config]).run_url)
    run.makedirs()
    prepare(load_config(CONFIG, [*TINY, *OWN, *config]), Run(run), never)  # type: ignore[arg-type]
    done = attempt(run.path, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    events = read_events(Store(str(run.path)).child("blocks", "00", "attempts", "1"))
    told = [event for event in events if event["event"] == "validation"]
    assert [event["step"] for event in told] == [3, 6, 9, 12, 15, 18, 20]
    assert {event["weights"] for event in told} == {"ema"} and len({event["loss"] for event in told}) == 7
    for mine, theirs in ((tensors(run.path, role), tensors(whole, role)) for role in ("model", "ema", "optim")):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def tensors(run: Path, role: str) -> dict[str, torch.Tensor]:
    return Run(Store(str(run))).block(0).checkpoints.load(STEPS, roles=None).parts[role]


def copy_until(whole: Path, last: int) -> Path:
    """The run as it was after this step."""
    run = Path(shutil.copytree(whole, whole.parent / f"until-{last}"))
    for folder in run.glob("blocks/00/step_*"):
        if int(folder.name.removeprefix("step_")) > last:
            shutil.rmtree(folder)
    return run


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob(f"blocks/00/step_{STEPS:08d}/*.safetensors")}


def second(run: Path, kind: str) -> list[dict[str, Any]]:
    events = read_events(Store(str(run)).child("blocks", "00", "attempts", "2"))
    return [event for event in events if event["event"] == kind]


def test_a_worker_with_an_old_listing_costs_the_block_no_bit(whole: Path) -> None:
    run = copy_until(whole, CUT)
    done = attempt(run, 2, hidden=CUT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [event["step"] for event in second(run, "resumed")] == [CUT]
    assert len(shards(whole)) == 3 and shards(run) == shards(whole)


def test_a_first_worker_that_refuses_keeps_the_other_from_waiting_for_it(whole: Path) -> None:
    run = copy_until(whole, 5)
    path = run / "blocks/00/step_00000005/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "all 1 checkpoints of block 0 are damaged" in attempt(run, 2).stderr
    assert [(end["outcome"], end["retry"]) for end in second(run, "end")] == [("failed", False)]
    assert not (run / "blocks/00/attempts/2/events-1.jsonl").exists()
