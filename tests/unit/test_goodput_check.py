"""What is read from the events of a run under faults, and what is simulated from it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.goodput_check import block_of, simulated


def write(run: Path, attempt: int, *events: tuple[float, str, dict[str, Any]]) -> None:
    folder = run / "blocks" / "00" / "attempts" / str(attempt)
    folder.mkdir(parents=True)
    lines = [json.dumps({"t": t, "event": event, **fields}) for t, event, fields in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + '\n{"t": 9')  # a worker that dies tears its last line


def a_run(run: Path) -> None:
    """Killed after 40 s, then asked to leave after 20 s, then done; a step takes 1 s."""
    write(
        run,
        1,
        (0, "start", {}),
        (5, "ready", {"step": 0}),
        (35, "commit", {"step": 30, "seconds": 0.5}),
        (45, "step", {"step": 40, "steps": 40, "seconds": 40.0}),
    )
    write(run, 2, (50, "start", {}))  # died before it trained
    write(run, 3, (60, "start", {}), (65, "ready", {"step": 30}), (85, "end", {"step": 50, "outcome": "stopped"}))
    write(
        run,
        4,
        (95, "start", {}),
        (95, "ready", {"step": 50}),
        (100, "step", {"step": 51, "steps": 1, "seconds": 4.0}),
        (101, "step", {"step": 52, "steps": 1, "seconds": 1.0}),
        (145, "commit", {"step": 100, "seconds": 0.5}),
    )


def test_a_blocks_events_are_summed_up(tmp_path: Path) -> None:
    a_run(tmp_path)
    block = block_of(tmp_path, 0)
    assert (block.seconds, block.steps, block.killed, block.left) == (140, 100, 1, 1)
    assert block.restarts == [20, 10]
    assert (block.step, block.slower) == (1, 3)


def test_a_simulated_run_loses_restarts_and_what_was_not_committed(tmp_path: Path) -> None:
    a_run(tmp_path)
    shares = sorted(simulated(block_of(tmp_path, 0), 30, 100, random.Random(0)))
    assert shares[-1] == pytest.approx(100 / 100.5)  # no fault at all but the last commit
    assert 0.6 < shares[len(shares) // 2] < 0.9
    assert shares[0] < 0.5
