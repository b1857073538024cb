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
START_S = 300.0

pytestmark = [pytest.mark.cluster, pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with Slurm(4, {"DBTRAIN_FAULTS": json.dumps(SLOW), "OMP_NUM_THREADS": "1"}) as made:
        yield made


def at_work(run: Path) -> list[str]:
    """Hosts of the blocks that have committed step 20 and are in the slow steps after it."""
    hosts = []
    for block in range(3):
        seen = events(run, block)
        if any(e["event"] == "commit" and e["step"] == 20 for e in seen) and seen[-1]["event"] != "end":
            hosts += [e["host"] for e in seen if e["event"] == "start"][-1:]
    return hosts


def resumed(run: Path) -> list[int]:
    """Steps from which attempts went on."""
    return [e["step"] for block in range(3) for e in events(run, block) if e["event"] == "resumed"]


def log(folder: Path, job: int) -> str:
    path = folder / f"dbtrain-{job}.log"
    return path.read_text() if path.exists() else ""


def test_a_lost_head_node_and_the_same_shards(slurm: Slurm, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The node with the head and a block goes: the job is queued again and goes on from its commits, on other nodes."""
    submitted = time.time()
    job = slurm.launch(tmp_path, *JOB)
    run = tmp_path / "runs" / "run"
    # a block of the other node may be done before that node hears that the head is gone
    slurm.wait_for(job, lambda: slurm.head(job) in at_work(run), START_S, tmp_path)
    head = slurm.head(job)
    token = slurm.environment_of_ray(head)["RAY_AUTH_TOKEN"]
    slurm.power_off(head)
    fault = time.time()
    slurm.wait(job, ["COMPLETED"], 280, tmp_path)
    assert slurm.field(job, "Restarts") == "1"
    assert slurm.head(job) != head
    assert shards(run, STEPS) == expected
    assert resumed(run) and min(resumed(run)) >= 10
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
    slurm.wait_for(job, lambda: bool(set(at_work(run)) - {slurm.head(job)}), START_S, tmp_path)
    lost = next(host for host in at_work(run) if host != slurm.head(job))
    slurm.power_off(lost)
    slurm.wait_for(job, lambda: bool(resumed(run)), START_S, tmp_path)
    assert (slurm.state(job), slurm.field(job, "Restarts")) == ("RUNNING", "0")
    slurm.call(["scancel", str(job)])
    wait_for(lambda: not slurm.processes(), 120, "the end of all processes")
    assert slurm.wait(job, ["CANCELLED"], 120, tmp_path) == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"
