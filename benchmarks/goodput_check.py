"""Checks `goodput.py` against a run under faults: the share of time that trained, measured and simulated.

Command:  dbtrain punish CONFIG ... ; python -m benchmarks.goodput_check RUN [RUN ...] --every STEPS

Everything is read from the events of the run's attempts. The simulation is given what is counted and timed there (how
often an attempt was ended, with or without a commit, how long it was until the next one trained, how long a step and a
commit took) and none of what it is to find: the share of each block's time, from its first step to its last one, that
ended up in its weights. A step counts as long as the run's median one. What took longer, because the worker was stopped
by SIGSTOP or the machine was busy, is no part of the model: it is taken off the time, and told.
"""

import argparse
import json
import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.goodput import Costs, kept, trained

SIMULATIONS = 1000
"""For the spread that chance alone gives."""
Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """What the events of one block say; times in seconds."""

    seconds: float
    """From the first step of the first attempt to the last of the last."""
    steps: int
    killed: int
    left: int
    """Attempts that committed before they ended."""
    restarts: list[float]
    """From the last word of an attempt to the first step of the next one."""
    commits: list[float]
    step: float
    """The median one."""
    slower: float
    """By which the steps together took longer than as many median ones."""


def attempts(run: Path, block: int) -> list[Events]:
    """Events of each attempt that came to train."""
    folders = sorted((run / "blocks" / f"{block:02d}" / "attempts").iterdir(), key=lambda path: int(path.name))
    read = [_events(folder / "events.jsonl") for folder in folders]
    return [events for events in read if any(e["event"] == "ready" for e in events)]


def _events(path: Path) -> Events:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def block_of(run: Path, block: int) -> Block:
    """Sum up the attempts of a block."""
    each = attempts(run, block)
    ready = [next(e["t"] for e in events if e["event"] == "ready") for events in each]
    last = [max(e["t"] for e in events if e["event"] in ("step", "commit", "end", "stopping")) for events in each[:-1]]
    saved = [any(e["event"] == "end" and e["outcome"] == "stopped" for e in events) for events in each[:-1]]
    commits = [e for events in each for e in events if e["event"] == "commit"]
    end = max(e["t"] for e in commits)
    reports = [(e["seconds"], e["steps"]) for events in each for e in events if e["event"] == "step"]
    step = statistics.median(seconds / steps for seconds, steps in reports)
    return Block(
        seconds=end - ready[0],
        steps=max(e["step"] for e in commits),
        killed=saved.count(False),
        left=saved.count(True),
        restarts=[start - stop for start, stop in zip(ready[1:], last, strict=True)],
        commits=[e["seconds"] for e in commits],
        step=step,
        slower=sum(seconds - steps * step for seconds, steps in reports),
    )


def blocks_of(run: Path) -> list[Block]:
    """Of all blocks of a run."""
    return [block_of(run, int(path.name)) for path in sorted((run / "blocks").iterdir()) if path.name.isdigit()]


def simulated(block: Block, interval: float, work: float, dice: random.Random) -> list[float]:
    """The shares of runs that do `work` seconds of training under the block's own rate of faults.

    A restart takes as long as one of those that were seen; faults that hit a restart are in its time.
    """
    training = block.seconds - block.slower - sum(block.restarts)
    costs = Costs(
        mtbf=training / block.killed if block.killed else math.inf,
        preempted=training / block.left if block.left else math.inf,
        stall=0.0,
        write=statistics.median(block.commits),
    )
    return [work / _seconds(costs, interval, work, block.restarts, dice) for _ in range(SIMULATIONS)]


def _seconds(costs: Costs, interval: float, work: float, restarts: list[float], dice: random.Random) -> float:
    """Until the work is done and committed."""
    done, seconds, leaves = 0.0, 0.0, (1 / costs.preempted) / costs.rate
    while True:
        up = dice.expovariate(costs.rate)
        left = work - done + costs.write
        if up >= left:
            return seconds + left
        done += (trained if dice.random() < leaves else kept)(up, costs, interval)
        seconds += up + dice.choice(restarts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with blocks/")
    parser.add_argument("--every", type=int, required=True, help="training.checkpoint_every, in steps")
    given = parser.parse_args()
    columns = ("run", "block", "killed", "left", "restart s", "s", "slower s", "measured", "simulated (5 %, 95 %)")
    table, dice = Table(*columns), random.Random(0)
    for run in given.runs:
        for number, block in enumerate(blocks_of(run)):
            if block.restarts:
                table.add_row(run.parent.name, str(number), *_row(block, given.every, dice))
    Console(width=120).print(table)


def _row(block: Block, every: int, dice: random.Random) -> list[str]:
    work = block.steps * block.step
    shares = sorted(simulated(block, every * block.step, work, dice))
    low, middle, high = (shares[int(q * (len(shares) - 1))] for q in (0.05, 0.5, 0.95))
    counts = [str(block.killed), str(block.left), f"{statistics.mean(block.restarts):.1f}"]
    times = [f"{block.seconds:.0f}", f"{block.slower:.0f}", f"{work / (block.seconds - block.slower):.3f}"]
    return [*counts, *times, f"{middle:.3f} ({low:.3f}, {high:.3f})"]


if __name__ == "__main__":
    main()
