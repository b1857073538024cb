"""A run is merged, drawn from and measured while it trains, and trains on as if nobody had looked."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.cluster.test_dit import CONFIG, SMALL
from tests.conftest import Command, events, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

LONG = ["training.steps=100000", "training.validate_every=50", "training.log_every=50", "training.checkpoint_every=10"]


def test_a_run_is_looked_at_while_it_trains(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    training = dbtrain("train", CONFIG, *SMALL, *LONG)
    folder = tmp_path / "runs" / "run"

    def all_have_commits() -> bool:
        assert training.process.poll() is None, training.output()
        return all(list(folder.glob(f"blocks/{block:02d}/step_*/COMMIT.json")) for block in range(2))

    wait_for(all_have_commits, 400, "a commit of each block")
    drawn = dbtrain("sample", "runs/run", "--now", "--count", "9", "--steps", "4")
    assert drawn.wait() == 0, drawn.output()
    assert "its blocks are not done: steps" in " ".join(drawn.output().split())
    with Image.open(tmp_path / "run-now.png") as picture:
        assert picture.size == (3 * 64 + 4, 3 * 64 + 4)
    merged = dbtrain("merge", "runs/run", "--now")
    assert merged.wait() == 0, merged.output()
    assert "it equals the blocks bit for bit; its blocks are not done: steps" in " ".join(merged.output().split())
    assert "of 100000" in json.loads((folder / "merged" / "config.json").read_text())["unfinished"]
    assert training.process.poll() is None, training.output()  # it trained all the while
    wait_for(lambda: any(e["event"] == "validation" for e in events(folder, 0)), 200, "a validation")
    training.process.send_signal(signal.SIGTERM)
    assert training.wait() == 1, training.output()
    run = Run(Store(folder))
    assert all(len(block.attempts) == 1 and block.committed > 0 for block in run.blocks), training.output()
