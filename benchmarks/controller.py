"""What the controller itself costs with many blocks: processor time, memory, and the time to replace the dead.

The run, its files, the controller and the view are real; only the cluster is not: its attempts are flags, and
another process writes the events that their workers would write.

Command:  python benchmarks/controller.py [--blocks 1000] [--deaths 100] [--every 5] [--seconds 20] [--terminal]
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from dbtrain.config import Config, load_config
from dbtrain.coordinator.controller import Controller
from dbtrain.coordinator.lifecycle import Phase
from dbtrain.coordinator.placement import Node
from dbtrain.coordinator.status import status
from dbtrain.coordinator.train import CommandObserver
from dbtrain.run.prepare import prepare
from dbtrain.run.requests import Request, requests
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.console import LiveView
from dbtrain.telemetry.events import EventLog
from dbtrain.telemetry.trackers import Trackers
from dbtrain.training.assignment import Assignment

CPUS = 8
"""Of each node, and so blocks at once on it."""


class Attempt:
    """An attempt that lives until somebody sets its error."""

    error: str | None = None

    @property
    def over(self) -> bool:
        return self.error is not None


class Cluster:
    """Nodes for all blocks; the attempts' words come from another process, which is told of each."""

    def __init__(self, blocks: int, tell: Callable[[str], None]) -> None:
        self.machines = [Node(f"node{i}", {"CPU": CPUS}) for i in range(-(-blocks // CPUS))]
        self.tell = tell
        self.newest: dict[int, Attempt] = {}
        self.placed: dict[int, float] = {}

    def nodes(self) -> list[Node]:
        return self.machines

    def start(self, assignment: Assignment, request: Request, name: str) -> Attempt:
        self.tell(f"{assignment.block} {assignment.attempt}\n")
        self.placed[assignment.block] = time.monotonic()
        self.newest[assignment.block] = Attempt()
        return self.newest[assignment.block]


class Watched(CommandObserver):
    """As of a command, and it remembers when the deaths were told."""

    def tell(self, line: str) -> None:
        noticed = self.__dict__.setdefault("noticed", [])
        if ": crashed" in line:
            noticed.append(time.monotonic())
        super().tell(line)


def write_events(url: str, every: float) -> None:
    """Be the workers: say a line for each attempt that standard input names, and then one each `every` seconds."""
    logs: dict[str, EventLog] = {}
    step = 0

    def listen() -> None:
        for line in sys.stdin:
            block, attempt = line.split()
            log = EventLog(Store(url).child("blocks", f"{int(block):02d}", "attempts", attempt))
            log.emit("start", rank=0, pid=1, host="nobody", device="cpu")
            log.emit("ready", step=0)
            logs[block] = log
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        step += 1
        pause = every / max(1, len(logs))
        for log in list(logs.values()):
            log.emit("step", step=step, loss=1 / step, lr=1e-3, seconds=every, steps=1, memory=1 << 30)
            time.sleep(pause)
        time.sleep(0.01)


def configuration(blocks: int, folder: str) -> Config:
    base = {
        "name": "run",
        "blocks": blocks,
        "model": {"arch": "vit", "depth": blocks, "dim": 16, "heads": 2, "patch": 4},
        "data": {"source": "digits"},
        "codebook": {"dim": 16},
        "noise": {"ranges": "uniform", "sigma_min": 0.1, "sigma_max": 10.0},
        "training": {"steps": 1_000_000},
        "cluster": {"backoff_s": 0.0},
    }
    return load_config(None, [f"out={folder}"], base=base)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Director(threading.Thread):
    """Watch the controller from another thread: wait, measure, kill, measure, and end it."""

    def __init__(self, controller: Controller, cluster: Cluster, observer: Watched, seconds: float, deaths: int):
        super().__init__(daemon=True)
        self.controller, self.cluster, self.observer = controller, cluster, observer
        self.seconds, self.deaths = seconds, deaths
        self.found: dict[str, float] = {}
        self.over = False

    def until(self, what: Callable[[], bool]) -> None:
        while not what():
            time.sleep(0.02)

    def run(self) -> None:
        began = time.monotonic()
        self.until(lambda: all(s.phase is Phase.RUNNING for s in self.controller.states))
        self.found["all blocks placed and running, s"] = time.monotonic() - began
        time.sleep(2)
        used, began = processor_seconds(), time.monotonic()
        time.sleep(self.seconds)
        share = (processor_seconds() - used) / (time.monotonic() - began)
        self.found["share of a core, %"] = 100 * share
        used, killed = processor_seconds(), time.monotonic()
        for block in range(self.deaths):
            self.cluster.newest[block].error = "RuntimeError: CUDA error: an illegal memory access"
        placed = self.cluster.placed
        self.until(lambda: all(placed[block] > killed for block in range(self.deaths)))
        self.found[f"{self.deaths} deaths told, s"] = max(self.observer.__dict__["noticed"]) - killed
        self.found[f"{self.deaths} deaths placed anew, s"] = max(placed[b] for b in range(self.deaths)) - killed
        self.found["processor time of that, s"] = processor_seconds() - used
        self.found["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.over = True


class Over(Exception):
    """The measurement is."""


def measure(blocks: int, deaths: int, every: float, seconds: float, terminal: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        config = configuration(blocks, folder)
        run = Run.at(config.run_url)
        run.store.makedirs()
        began = time.process_time()
        run_plan = prepare(config, run, lambda *_: {})
        found = {"prepare, processor s": time.process_time() - began}
        command = [sys.executable, __file__, "--write", run.store.url, "--every", str(every)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1) as workers:
            assert workers.stdin is not None
            cluster = Cluster(blocks, workers.stdin.write)
            console = Console(file=nowhere, force_terminal=terminal, width=160, height=50)
            with LiveView(console) as view:
                observer = Watched(run, run_plan, view, Trackers([], view.tell))

                def guard() -> None:
                    if director.over:
                        raise Over

                controller = Controller(run, config, cluster, requests(config, "cpu"), observer, guard)
                director = Director(controller, cluster, observer, seconds, deaths)
                director.start()
                with contextlib.suppress(Over):
                    controller.run()
            found |= director.found
        used, began = time.process_time(), time.monotonic()
        status(Run.at(config.run_url))
        return found | {"status, processor s": time.process_time() - used, "status, s": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--deaths", type=int, default=100)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two lines of a worker's log")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which the share of a core is measured")
    parser.add_argument("--terminal", action="store_true", help="draw the table as in a terminal")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write_events(given.write, given.every)
    found = measure(given.blocks, given.deaths, given.every, given.seconds, given.terminal)
    settings = {"blocks": given.blocks, "line every s": given.every, "terminal": given.terminal}
    load = [round(value, 1) for value in os.getloadavg()]
    print(json.dumps({**settings, **{k: round(v, 2) for k, v in found.items()}, "load": load}, indent=1))


if __name__ == "__main__":
    main()
