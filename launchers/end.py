"""End what a launcher's `up` started on this machine, and nothing else:
`python end.py HOST:PORT` of the cluster.

`up` marks what it starts by a variable in the environment. So nothing is remembered in a file, which may be
lost or be older than a reboot, and what a broken `up` left is found as well. Other clusters of Ray live on.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "DBTRAIN_CLUSTER"
GRACE_S = 6.0
"""For each part to end by itself, as long as `ray stop` gives."""


def started(address: str) -> list[psutil.Process]:
    """The processes that carry the mark, and those below them: Ray's workers overwrite their environment."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or is somebody else's
            if process.environ().get(MARK) == address and _network(process.pid) == _network(os.getpid()):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    return [process for pid, process in found.items() if pid != os.getpid()]


def _network(pid: int) -> str:
    """A container's network: its 127.0.0.1 is another one."""
    return os.readlink(f"/proc/{pid}/ns/net")


def end(processes: list[psutil.Process]) -> list[psutil.Process]:
    """In Ray's order: the node, then all but the head's register,
    then that; returns those that are still there."""
    node = [process for process in processes if _name(process) == "raylet"]
    rest = [process for process in processes if _name(process) != "gcs_server"]
    for part in (node, rest, processes):
        _signal(part, signal.SIGTERM)
    _signal(processes, signal.SIGKILL)
    return [process for process in processes if _lives(process)]


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send it and wait."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)
    until = time.monotonic() + GRACE_S
    while any(_lives(process) for process in processes) and time.monotonic() < until:
        time.sleep(0.1)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _lives(process: psutil.Process) -> bool:
    """A container's first process may leave what has ended as a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def forget(address: str) -> None:
    """Remove the file from which Ray takes the address `auto`, if it names this cluster."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(temporary, "ray", "ray_current_cluster")
    with suppress(OSError):
        if file.read_text().strip() == address:
            file.unlink()


def main(address: str) -> int:
    """Say what was ended."""
    processes = started(address)
    left = end(processes)
    if left:
        print(f"{len(left)} processes of {address} could not be ended: {[p.pid for p in left]}", file=sys.stderr)
        return 1
    forget(address)
    print(f"{address}: {len(processes)} processes ended" if processes else f"{address}: nothing that `up` started runs")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} HOST:PORT")
    sys.exit(main(sys.argv[1]))
