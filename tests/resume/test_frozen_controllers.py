"""The process that has the controllers of all attempts is frozen for longer than Ray waits for an answer."""

import os
import signal
import time
from pathlib import Path

import pytest

from dbtrain.experiments.victims import controllers
from tests.conftest import STEPS, TRAIN, Command, events, shards, wait_for

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(600)]

FROZEN_S = 25
"""Ray calls a process unavailable after some 16 s."""


def test_its_blocks_train_on_and_none_is_begun_anew(tmp_path: Path, expected: dict[str, bytes]) -> None:
    # so many processors that a second attempt beside a first one would find no room on two
    command = Command(tmp_path, [*TRAIN, f"out={tmp_path}", "cluster.cpus_per_worker=0.65"], [])
    try:
        wait_for(lambda: all(_told(tmp_path / "run", block, "ready") for block in range(3)), 300, "three blocks")
        (process,) = controllers(command.process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(FROZEN_S)
        os.kill(process.pid, signal.SIGCONT)
        assert command.wait() == 0, command.output()
    finally:
        command.kill()
    assert "attempt 2" not in command.output()
    assert shards(tmp_path / "run", STEPS) == expected


def _told(run: Path, block: int, event: str) -> bool:
    return any(e["event"] == event for e in events(run, block))
