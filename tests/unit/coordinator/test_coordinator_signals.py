"""A worker keeps listening for warnings although Ray sets a handler of its own after ours."""

import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

from dbtrain.coordinator.train import _stopping

PROGRAM = """
import os, signal, sys, threading, time
from dbtrain.coordinator.ray import signals

def as_ray_does(number, frame):
    sys.exit(3)

signals.install()
signal.signal(signal.SIGTERM, as_ray_does)
if {take_over}:
    thread = threading.Thread(target=signals.take_over)
    thread.start()
    while thread.is_alive():
        time.sleep(0.01)
os.kill(os.getpid(), signal.{name})
for _ in range(200):
    if signals.PROCESS_STOP.requested:
        break
    time.sleep(0.01)
print(signals.PROCESS_STOP.reason)
"""


def _run(name: str, take_over: bool) -> tuple[int, str]:
    program = PROGRAM.format(name=name, take_over=take_over)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip()


def test_a_warning_after_taking_over_is_a_request_and_ends_nothing() -> None:
    assert _run("SIGTERM", True) == (0, "SIGTERM")
    assert _run("SIGUSR1", True) == (0, "SIGUSR1")


def test_without_taking_over_rays_handler_ends_the_process() -> None:
    assert _run("SIGTERM", False)[0] == 3


def test_a_command_in_another_thread_leaves_signals_to_the_main_one():
    """As a program that calls `dbtrain.train` from a thread, where Python refuses to set a handler."""
    before = signal.getsignal(signal.SIGTERM)
    seen, failed = [], []

    def work():
        try:
            with _stopping(SimpleNamespace(stopping=False, stop=seen.append), lambda line: None):
                seen.append(signal.getsignal(signal.SIGTERM))
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == [] and seen == [before]
    with _stopping(SimpleNamespace(stopping=False, stop=seen.append), lambda line: None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
