"""A command that is ended while its pilots train, before there is a run."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CONFIG, Command, wait_for

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_pilot_gives_the_lock_back(
    dbtrain: Callable[..., Command], tmp_path: Path, number: signal.Signals
) -> None:
    command = dbtrain("train", CONFIG, "name=run")
    wait_for(lambda: "training the pilots" in command.output(), 300, "the pilot's start")
    assert (tmp_path / "runs/run/LOCK.json").exists()
    command.process.send_signal(number)
    # Python ends itself by SIGINT where that met it in C code that had taken note of it
    assert command.wait(300) in (128 + number, -number), command.output()
    assert "stopped: what is committed stays" in command.output() and "Traceback" not in command.output()
    assert not (tmp_path / "runs/run/LOCK.json").exists()
