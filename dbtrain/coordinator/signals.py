"""SIGTERM and SIGUSR1 in a worker process: Slurm's and Kubernetes' warnings become a request to commit and leave."""

import os
import signal
import threading
from types import FrameType

from dbtrain.training.watchdog import StopRequest

PROCESS_STOP = StopRequest()
"""Signals belong to the process, so this one object is the process's."""

WARNINGS = (signal.SIGTERM, signal.SIGUSR1)


def install() -> None:
    """Listen; called by Ray in the main thread of every worker process it starts.

    Ray's main thread waits in C++, where Python handlers do not run; the wake-up descriptor is written by the signal
    itself, and a thread reads it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in WARNINGS:
        signal.signal(number, _nothing)
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the descriptor to be written; the thread does the rest."""


def _listen(reading: int) -> None:
    while data := os.read(reading, 16):
        for number in data:
            if number in WARNINGS:
                PROCESS_STOP.request(signal.Signals(number).name)
