"""The Slurm launcher on a real Slurm: three nodes, each a host of its own."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.conftest import RUN, STEPS, events, shards, wait_for

JOB = [*RUN, "out=runs", "cluster.cpus_per_worker=1", "--nodes", "2", "--cpus-per-node", "2"]
SLOW = [{"block": block, "step": step, "kind": "slow"} for block in range(3) for step in range(21, 26)]
"""Three seconds each: time to pull a plug between the commits of steps 20 and 30."""
START_S = 120.0

pytestmark = [pytest.mark.cluster, pytest.mark.slurm]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with Slurm(4, {"DBTRAIN_FAULTS": json.dumps(SLOW), "OMP_NUM_THREADS": "1"}) as made:
        yield made


def committed(run: Path, step: int) -> bool:
    return all(any(e["event"] == "commit" and e["step"] == step for e in events(run, block)) for block in range(3))


def log(folder: Path, job: int) -> str:
    path = folder / f"dbtrain-{job}.log"
    return path.read_text() if path.exists() else ""


def test_a_lost_head_node_and_the_same_shards(slurm: Slurm, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The node with the head and a block goes: the job is queued again and goes on from its commits, on other nodes."""
    submitted = time.time()
    job = slurm.launch(tmp_path, *JOB)
    run = tmp_path / "runs" / "run"
    wait_for(lambda: committed(run, 20), START_S, "step 20 of all blocks")
    head = slurm.head(job)
    assert {e["host"] for block in range(3) for e in events(run, block) if e["event"] == "start"} == {"n1", "n2"}
    token = slurm.environment_of_ray(head)["RAY_AUTH_TOKEN"]
    slurm.power_off(head)
    fault = time.time()
    slurm.wait(job, ["COMPLETED"], 280, tmp_path)
    assert slurm.field(job, "Restarts") == "1"
    assert slurm.head(job) != head
    assert shards(run, STEPS) == expected
    resumed = [e["step"] for block in range(3) for e in events(run, block) if e["event"] == "resumed"]
    assert len(resumed) == 3 and min(resumed) >= 20
    ready = [e["t"] for block in range(3) for e in events(run, block) if e["event"] == "ready"]
    print(
        f"first step {min(ready) - submitted:.1f} s after the command, and {max(ready) - fault:.1f} s after the fault"
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(token) == 64 and not [path for path in files if token.encode() in path.read_bytes()]
    assert token not in slurm.call(["scontrol", "show", "job", str(job)])


def test_a_lost_worker_node_leaves_the_job_and_scancel_ends_everything(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.launch(tmp_path, *JOB)
    run = tmp_path / "runs" / "run"
    wait_for(lambda: committed(run, 20), START_S, "step 20 of all blocks")
    head = slurm.head(job)
    lost = next(
        e["host"] for block in range(3) for e in events(run, block) if e["event"] == "start" and e["host"] != head
    )
    slurm.power_off(lost)
    wait_for(lambda: any(e["event"] == "resumed" for b in range(3) for e in events(run, b)), 120, "the block elsewhere")
    assert (slurm.state(job), slurm.field(job, "Restarts")) == ("RUNNING", "0")
    slurm.call(["scancel", str(job)])
    wait_for(lambda: not slurm.processes(), 30, "the end of all processes")
    assert slurm.wait(job, ["CANCELLED"], 30, tmp_path) == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"
