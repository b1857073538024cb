"""A block on two nodes loses one of them: a preemption, whatever its other worker says of broken connections."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import read_events
from tests.conftest import CONFIG, ROOT, TINY, ray_folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

OWN = ["blocks=1", "training.steps=200000", "cluster.workers=2", "cluster.cpus_per_worker=1", "cluster.device=cpu"]


def test_a_lost_node_of_a_block_of_two_workers_is_a_preemption(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/cluster/lose_node.py"), str(tmp_path), CONFIG, *TINY, *OWN],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder(), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=860,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "its node was lost" in done.stdout
    block = Store(str(tmp_path)).child("run", "blocks", "00")
    state = json.loads(block.read("state.json"))
    assert (state["preemptions"], state["crashes"]) == (1, 0)
    ends = [event for event in read_events(block.child("attempts", "1")) if event["event"] == "end"]
    assert [end["outcome"] for end in ends] == ["crashed"]  # the first worker's own word, which came first
