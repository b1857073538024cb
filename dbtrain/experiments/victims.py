"""What a run on this machine consists of, found from outside:
its processes, and which of them commits right now."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass

import psutil

from dbtrain.run.run import Run
from dbtrain.telemetry.events import read_events

COMMIT_PATIENCE_S = 1.0
"""How long a commit is waited for."""
CONTROLLER = "ray::TrainControllers"
"""Title of the process that has the controllers of all attempts of a command."""


@dataclass(frozen=True)
class Worker:
    """A worker process of a block."""

    block: int
    attempt: int
    process: psutil.Process


def workers(run: Run, driver: int) -> list[Worker]:
    """Workers of a run that live below the command with process number `driver`, from their events.

    Raises:
        ShardError: the run's directory cannot be read.
    """
    below = {process.pid: process for process in descendants(driver)}
    found = []
    for block in run.begun:
        attempt = max(block.attempts, default=0)
        events = read_events(block.attempt(attempt)) if attempt else []
        pid = next((e["pid"] for e in events if e["event"] == "start"), None)
        if pid in below and not any(e["event"] == "end" for e in events):
            found.append(Worker(block.number, attempt, below[pid]))
    return found


def descendants(driver: int) -> list[psutil.Process]:
    """All processes that a process has started, directly or not; none when it is gone."""
    try:
        return psutil.Process(driver).children(recursive=True)
    except psutil.Error:
        return []


def controllers(driver: int) -> list[psutil.Process]:
    """Processes of Ray Train's controllers below a command: one, or none before the first attempt."""
    return [process for process in descendants(driver) if _title(process).startswith(CONTROLLER)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether the process was there to get it; a number that was given to another process is not hit."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


def await_commit(run: Run, block: int) -> bool:
    """Wait until a block writes a checkpoint, or for a while; whether it does."""
    folder = str(run.block(block).store.path)
    until = time.monotonic() + COMMIT_PATIENCE_S
    while time.monotonic() < until:
        if _committing(folder):
            return True
        time.sleep(0.0005)
    return False


def _committing(folder: str) -> bool:
    with contextlib.suppress(OSError):
        for step in (entry for entry in os.scandir(folder) if entry.name.startswith("step_")):
            names = os.listdir(step.path)
            if "COMMIT.json" not in names or any(name.endswith(".tmp") for name in names):
                return True
    return False
