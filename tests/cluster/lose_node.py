"""Start a Ray cluster of four nodes on this machine and a run of one block on two of them, and lose one of the two.

The second worker's node goes with all its processes, as a spot instance taken back does. Arguments: folder, overrides.
Ends when the block trains again, or raises.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dbtrain.coordinator.ray.settings import SETTINGS

os.environ |= {**SETTINGS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

from ray.cluster_utils import Cluster  # noqa: E402

from dbtrain.shards.storage.store import Store  # noqa: E402
from dbtrain.telemetry.events import read_events  # noqa: E402

MEMORY = 80_000_000


def until(found: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"no {what} within {seconds:g} s")


def event(run: Path, attempt: int, kind: str) -> dict[str, Any] | None:
    events = read_events(Store(str(run)).child("blocks", "00", "attempts", str(attempt)))
    return next((event for event in events if event["event"] == kind), None)


def below(node: Any) -> list[psutil.Process]:
    return psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)


def lose(nodes: list[Any], first: int) -> None:
    """The node with a worker that is not the first one."""
    for node in nodes:
        processes = below(node)
        if any("RayTrainWorker" in " ".join(p.cmdline()) for p in processes) and first not in [
            p.pid for p in processes
        ]:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in (raylet, *processes):
                process.kill()
            return
    raise AssertionError("no node has a second worker alone")


def main(folder: Path, *overrides: str) -> None:
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(3)]
    run = folder / "run"
    where = ["name=run", f"out={folder}", f"cluster.address={cluster.address}"]
    command = subprocess.Popen([sys.executable, "-m", "dbtrain", "train", *overrides, *where], cwd=folder)
    try:
        until(lambda: event(run, 1, "commit"), "commit")
        lose(nodes, event(run, 1, "start")["pid"])  # type: ignore[index]
        until(lambda: event(run, 2, "step"), "step of a second attempt")
        command.send_signal(signal.SIGINT)
        command.wait(240)
    finally:
        command.kill()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
