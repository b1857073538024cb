"""The command itself is hit: Ctrl-C, a full disk, SIGKILL, a rival, a frozen worker; the same command continues."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from dbtrain.experiments.victims import controllers, send
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from tests.conftest import STEPS, TRAIN, Command, events, shards, wait_for

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(1800)]

DISK = "6m"
FROZEN_S = 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, so small that it can be filled."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        message = f"cannot mount a tmpfs: {made.stderr.decode().strip()}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def slow(*steps: int) -> list[dict[str, object]]:
    return [{"block": block, "step": step, "kind": "slow"} for block in range(3) for step in steps]


def count(run: Path, event: str) -> int:
    return sum(e["event"] == event for block in range(3) for e in events(run, block))


def fill(path: Path) -> Path:
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def test_the_same_command_continues_whatever_ended_it(disk: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    run, started = disk / "run", []

    def start(*more: str, faults: list[dict[str, object]] | None = None, **variables: str) -> Command:
        started.append(Command(tmp_path, [*TRAIN, f"out={disk}", *more], faults or [], **variables))
        return started[-1]

    try:
        stopped = start("cluster.cpus_per_worker=0.9", faults=slow(20))
        a_signal_to_the_group_commits(stopped, run, signal.SIGINT)
        ended = start("cluster.cpus_per_worker=0.9", faults=slow(26, 27))
        a_signal_to_the_group_commits(ended, run, signal.SIGTERM)
        full = start("cluster.cpus_per_worker=1.1", "cluster.max_crashes=0", faults=slow(33, 34))
        a_full_disk_loses_no_commit(full, run, disk)
        killed = start("cluster.cpus_per_worker=1.1", faults=slow(42, 43))
        a_dead_controller_gives_its_resources_back(killed, run)
        sigkill(killed)
        last = start("cluster.cpus_per_worker=1.1", faults=slow(52, 53), **frozen_after(FROZEN_S))
        a_frozen_worker_is_replaced_and_a_rival_refused(last, run, start)
    finally:
        for command in started:
            command.kill()
    assert shards(run, STEPS) == expected
    assert "Traceback" not in "".join(command.output() for command in started)


def a_signal_to_the_group_commits(command: Command, run: Path, number: int) -> None:
    before = count(run, "step")
    wait_for(lambda: count(run, "step") > before, 300, "a step")
    os.killpg(command.process.pid, number)  # as a terminal and `timeout` do: to the command and its group
    assert command.wait() == 1, command.output()
    assert "The same command continues" in command.output()
    ends = [e for block in range(3) for e in events(run, block) if e["event"] == "end"]
    assert ends
    for block in range(3):
        told = events(run, block)
        committed = [e["step"] for e in told if e["event"] == "commit"]
        assert committed[-1:] == [e["step"] for e in told if e["event"] == "step"][-1:]  # no step is lost


def a_full_disk_loses_no_commit(command: Command, run: Path, disk: Path) -> None:
    before, newest = count(run, "ready"), commits(run)
    assert max(newest) > 0
    wait_for(lambda: count(run, "ready") > before, 300, "a block that trains")
    filler = fill(disk)
    assert command.wait() == 1, command.output()
    output = " ".join(command.output().split())
    assert "the disk is full; free space" in output
    assert "0 of 3 blocks are done" in output
    assert all(now >= then for now, then in zip(commits(run), newest, strict=True))
    filler.unlink()


def commits(run: Path) -> list[int]:
    """Newest commit of each block, 0 for none; every byte of every commit is verified."""
    manifest = read_manifest(Store(run))
    found = []
    for block in range(3):
        checkpoints = Checkpoints(Store(run / "blocks" / f"{block:02d}"), manifest.identity(block))
        assert all(checkpoints.verify(step) == [] for step in checkpoints.steps())
        found.append(max(checkpoints.steps(), default=0))
    return found


def a_dead_controller_gives_its_resources_back(command: Command, run: Path) -> None:
    """The process of all controllers goes, also of blocks that wait; what they held is free for the next attempts."""
    before = count(run, "ready")
    wait_for(lambda: count(run, "ready") > before, 300, "a block that trains")
    there = controllers(command.process.pid)
    assert len(there) == 1 and all(send(controller, signal.SIGKILL) for controller in there)
    wait_for(lambda: count(run, "ready") > before + 1, 300, "a block that trains again")


def sigkill(command: Command) -> None:
    command.process.kill()
    command.process.wait(120)


def frozen_after(seconds: float) -> dict[str, str]:
    return {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(seconds)}


def a_frozen_worker_is_replaced_and_a_rival_refused(command: Command, run: Path, start: object) -> None:
    before, lost = count(run, "ready"), attempts(run)
    wait_for(lambda: count(run, "ready") > before, 300, "a block that trains")
    block = next(b for b in range(3) if attempts(run)[b] > lost[b])
    pid = [e["pid"] for e in events(run, block) if e["event"] == "start"][-1]
    os.kill(pid, signal.SIGSTOP)
    rival = start()  # type: ignore[operator]
    assert rival.wait() == 1
    assert "dbtrain train run" in rival.output()
    assert "wait for it or stop it" in rival.output()
    assert command.wait() == 0, command.output()
    assert f"block {block}: crashed" in command.output()
    assert attempts(run)[block] == lost[block] + 2
    trained = sorted(spans(run, lost))
    # the blocks queued: on two cores one of 1.1 at a time
    assert all(end < start for (_, end), (start, _) in pairwise(trained)), trained


def spans(run: Path, after: list[int]) -> list[tuple[float, float]]:
    """From when to when each attempt trained, of those after the first `after[block]` of a block."""
    found = []
    for block in range(3):
        paths = [run / f"blocks/{block:02d}/attempts/{n}/events.jsonl" for n in range(after[block] + 1, 99)]
        for told in ([json.loads(line) for line in path.open()] for path in paths if path.exists()):
            found += [(e["t"], told[-1]["t"]) for e in told if e["event"] == "ready"]
    return found


def attempts(run: Path) -> list[int]:
    return [len(list(run.glob(f"blocks/{block:02d}/attempts/*/events.jsonl"))) for block in range(3)]
