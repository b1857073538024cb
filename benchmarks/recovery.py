"""How long a killed worker is missed: from SIGKILL to its detection, to the next worker, and to its next step.

Command:  python benchmarks/recovery.py [--kills 5]      (two blocks on this machine, shipped settings)
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SMALL = (
    "blocks=2 cluster.cpus_per_worker=0.5 model.depth=2 model.dim=16 model.heads=2 model.patch=4 codebook.dim=16 "
    "noise.ranges=uniform noise.sigma_min=0.5 noise.sigma_max=20 training.steps=1000000 training.batch_size=16 "
    "training.checkpoint_every=100 training.log_every=1"
)
HIT = 1
"""The block whose worker is killed; the other one trains on beside it."""
PATIENCE_S = 120.0


def events(run: Path, attempt: int) -> list[dict[str, Any]]:
    path = run / "blocks" / f"{HIT:02d}" / "attempts" / str(attempt) / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def wait_for(run: Path, attempt: int, kind: str) -> dict[str, Any]:
    """The first event of a kind of an attempt."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        found = next((event for event in events(run, attempt) if event["event"] == kind), None)
        if found:
            return found
        time.sleep(0.02)
    raise TimeoutError(f"attempt {attempt} has no {kind!r} within {PATIENCE_S} s")


def kill(run: Path, attempt: int) -> dict[str, float]:
    """Kill an attempt's worker after its first commit; seconds from then to each thing that follows."""
    wait_for(run, attempt, "commit")
    pid = int(events(run, attempt)[0]["pid"])
    os.kill(pid, signal.SIGKILL)
    killed = time.time()
    started = wait_for(run, attempt + 1, "start")["t"]
    owner = json.loads((run / "blocks" / f"{HIT:02d}" / "OWNER.json").read_text())
    assert owner["attempt"] == attempt + 1
    step = wait_for(run, attempt + 1, "step")["t"]
    ready = wait_for(run, attempt + 1, "ready")["t"]
    return {
        "death to detection and placement": owner["time"] - killed,
        "placement to the new worker's first word": started - owner["time"],
        "first word to resumed and ready": ready - started,
        "ready to the next step": step - ready,
        "detection to the next step": step - owner["time"],
        "death to the next step": step - killed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        command = subprocess.Popen(
            [sys.executable, "-m", "dbtrain", "train", str(ROOT / "configs/vit_digits.yaml")]
            + ["name=run", f"out={folder}", *SMALL.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            found = [kill(Path(folder) / "run", attempt) for attempt in range(1, kills + 1)]
        finally:
            command.send_signal(signal.SIGINT)
            command.wait(120)
    table = Table("seconds", "median", "least", "most", title=f"{kills} workers killed, one after the other")
    for name in found[0]:
        values = [seconds[name] for seconds in found]
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
