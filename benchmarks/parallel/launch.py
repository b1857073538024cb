"""Starts the processes of a job, waits for what they found, and ends them all."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.parallel.job import IDEAL, Job

GRACE_S = 5.0
"""For the others to say what went wrong, once one has."""
POLL_S = 0.2
ROOT = Path(__file__).parents[2]


class Process(Protocol):
    """As `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...


Start = Callable[[int, Sequence[str], Mapping[str, str], Path], Process]
"""Starts a rank's command with these variables and its output in a file."""


def local(rank: int, command: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
    """On this machine; each process sees one GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    card = visible[rank] if rank < len(visible) and visible[rank] else str(rank)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": card},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(job: Job, limit_s: float, start: Start = local, address: str = "127.0.0.1") -> dict[str, Any]:
    """A row: what the processes of a job found together, or an `error`."""
    misfit = job.misfit()
    if misfit:
        return _row(job, error=misfit)
    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, folder=folder)
        job.prepare()
        job.write()
        port = free_port() if start is local else 29400
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        processes = []
        try:
            for rank in range(job.processes):
                command = [sys.executable, "-m", "benchmarks.parallel.rank", folder, str(rank), address, str(port)]
                processes.append(start(rank, command, variables, Path(folder) / f"rank-{rank}.log"))
            return _row(job, **_gather(job, processes, limit_s))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


def _row(job: Job, **found: Any) -> dict[str, Any]:
    fields = {key: value for key, value in asdict(job).items() if key != "folder"}
    return {**fields, **found}


def _gather(job: Job, processes: Sequence[Process], limit_s: float) -> dict[str, Any]:
    end = time.monotonic() + limit_s
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            end = min(end, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    return together(job, [_said(job, rank, limit_s) for rank in range(job.processes)])


def _said(job: Job, rank: int, limit_s: float) -> dict[str, Any]:
    path = Path(job.folder) / f"rank-{rank}.json"
    if path.exists():
        return json.loads(path.read_text())
    tail = (Path(job.folder) / f"rank-{rank}.log").read_text(errors="replace")[-600:]
    return {"error": f"rank {rank} said nothing within {limit_s:g} s or ended: {tail}"}


def together(job: Job, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A step takes as long as that of the slowest process; memory is that of the fullest GPU."""
    errors = [rank["error"] for rank in ranks if "error" in rank]
    if errors:
        return {"error": next((e for e in errors if e == "out of memory"), errors[0])}
    seconds = [max(each) for each in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    # of as many GPUs as a block has, which nothing holds up either
    side_by_side = job.workers if job.method == IDEAL else 1
    rates = sorted(side_by_side * job.batch / s for s in seconds)
    idle = [rank["idle"] for rank in ranks if rank["idle"] is not None]
    return {
        "seconds_each": seconds,
        "samples_per_s": statistics.median(rates),
        "samples_per_s_least": rates[0],
        "samples_per_s_most": rates[-1],
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "device_bytes": max(rank.get("device_bytes", 0) for rank in ranks),
        "sent_bytes": max(rank["sent_bytes"] for rank in ranks),
        "idle": max(idle) if idle else None,
    }
