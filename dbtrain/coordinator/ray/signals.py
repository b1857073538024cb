"""SIGTERM and SIGUSR1 in a worker process: Slurm's and
Kubernetes' warnings become a request to commit and leave."""

import _thread
import os
import signal
import threading
import time
from types import FrameType

from dbtrain.training.watchdog import StopRequest

PROCESS_STOP = StopRequest()
"""Signals belong to the process, so this one object is the process's."""

WARNINGS = (signal.SIGTERM, signal.SIGUSR1)
REINSTALL = signal.SIGUSR2
"""Never sent from outside: it makes the main thread run a Python function of ours."""


def install() -> None:
    """Listen; called by Ray in the main thread of every worker process it starts.

    Ray's main thread waits in C++, where Python handlers do not run; the
    wake-up descriptor is written by the signal itself, and a thread reads it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(REINSTALL, _take)
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()
    _take(REINSTALL, None)


def take_over(patience_s: float = 15.0) -> bool:
    """Handle the warnings in this process from now on; called from the training thread.
    Whether it worked in time.

    After `install` Ray sets a SIGTERM handler of its own, which leaves the process at the main thread's next
    Python instruction, in the middle of our commit. Only the main thread may set handlers, so it is made to
    run `_take`.
    """
    until = time.monotonic() + patience_s
    while signal.getsignal(signal.SIGTERM) is not _nothing:
        if time.monotonic() > until:
            return False
        _thread.interrupt_main(REINSTALL)
        time.sleep(0.05)
    return True


def _take(number: int, frame: FrameType | None) -> None:
    for warning in WARNINGS:
        signal.signal(warning, _nothing)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the descriptor to be written; the thread does the rest."""


def _listen(reading: int) -> None:
    while data := os.read(reading, 16):
        for number in data:
            if number in WARNINGS:
                PROCESS_STOP.request(signal.Signals(number).name)
