"""Times the steps of one process, its memory, and what one profiled step computed and sent."""

import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.profiler import ProfilerActivity, profile

from benchmarks.parallel.job import Job
from benchmarks.parallel.trace import busy_seconds, sent_bytes


class Enough(BaseException):
    """All turns are taken; no `Exception`, so that dbtrain's worker neither commits nor counts it as a crash."""


def meet(store: TCPStore, processes: int, name: str) -> None:
    """Wait until so many processes are here."""
    if store.add(f"here-{name}", 1) == processes:
        store.set(f"go-{name}", "1")
    store.wait([f"go-{name}"])


@dataclass
class Meter:
    """Called before every step: a turn of steps warms up, is timed or is profiled; then it raises `Enough`.

    All processes begin a turn together. They meet at a store, not in a process group: isolated blocks have none.
    """

    job: Job
    store: TCPStore
    device: torch.device
    ring: int
    """Members of the process group."""
    found: dict[str, Any] = field(default_factory=dict)
    _left: int = 0
    _turn: int = -1
    _kind: str = ""
    _started: float = 0.0
    _profile: Any = None

    def __post_init__(self) -> None:
        self._plan = ["warm", *["time"] * self.job.rounds, "profile"]
        self.found["seconds"] = []

    def before_step(self) -> None:
        """Ends a turn and begins the next one, where a turn is over."""
        if self._left == 0:
            self._end()
            self._begin()
        self._left -= 1

    def _begin(self) -> None:
        if not self._plan:
            raise Enough
        self._kind = self._plan.pop(0)
        self._turn += 1
        self._left = {"warm": self.job.warmup, "time": self.job.steps, "profile": 1}[self._kind]
        meet(self.store, self.job.processes, f"turn-{self._turn}")
        if self._kind == "profile":
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.__enter__()
        self._started = time.perf_counter()

    def _end(self) -> None:
        self._wait()
        seconds = time.perf_counter() - self._started
        if self._kind == "warm" and self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._kind == "time":
            self.found["seconds"].append(seconds / self.job.steps)
            self.found["peak_bytes"] = self._peak()
        elif self._kind == "profile":
            self._profile.__exit__(None, None, None)
            self._read_profile()

    def _read_profile(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        self.found["sent_bytes"] = sent_bytes(events, self.ring)
        step = statistics.median(self.found["seconds"])
        # profiling slows the host, not the kernels: their time is compared with a step that was not profiled
        self.found["idle"] = 1 - busy_seconds(events) / step if self._cuda else None
        if self._cuda:
            free, total = torch.cuda.mem_get_info()
            self.found["device_bytes"] = total - free

    def _peak(self) -> int:
        """Of the allocator on a GPU; of the whole process on a CPU, with all that it imported."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
