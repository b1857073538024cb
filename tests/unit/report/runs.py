"""Runs for reports: settled, committed and told by events, without any training."""

import json
import time
from pathlib import Path

from dbtrain.run.run import Run
from dbtrain.telemetry.events import COORDINATOR, EventLog
from tests.unit.small_runs import commit, settled

BEGAN = 1_790_000_000.0
SCORES = {
    "validation": {"mean": 0.75, "chain": 0.7},
    "test": {"mean": 0.8125, "chain": 0.71, "class_0": 0.5},
}


def steps(run, block, attempt, points, began=BEGAN, end="done", **ending):
    """Events of one attempt: `points` are (step, loss), two seconds apart."""
    clock = iter(began + 2.0 * n for n in range(100))
    log = EventLog(run.block(block).attempt(attempt), clock=lambda: next(clock))
    log.emit("start", rank=0, pid=1, host="node", device="cpu")
    log.emit("ready", step=points[0][0] - 1, parameters=10)
    for step, loss in points:
        log.emit("step", step=step, loss=loss, memory=300 << 20, steps=1, seconds=2.0)
        log.emit("validation", step=step, loss=loss + 0.1)
    log.emit("commit", step=points[-1][0], loss=points[-1][1], seconds=0.1)
    if end:
        log.emit("end", outcome=end, reason=None, **ending)


def finished(out, **changes):
    """Two blocks that are done; block 1 after a worker of it was killed."""
    store = settled(out, **changes)
    commit(store)
    run = Run.at(store.url)
    steps(run, 0, 1, [(1, 1.5), (2, 0.25)])
    steps(run, 1, 1, [(1, 1.25)], end="")
    EventLog(run.block(1).attempt(1), COORDINATOR, clock=lambda: BEGAN + 9).emit(
        "died", error="Worker unexpectedly exits with a connection error code 2."
    )
    steps(run, 1, 2, [(1, 1.25), (2, 0.125)], began=BEGAN + 20)
    return run


def evaluated(run, scores=SCORES, **more):
    record = {"metric": "accuracy", "better": "higher", "scores": scores, "sizes": {"validation": 144, "test": 359}}
    run.store.write_json("evaluation.json", {**record, **more})


def measured(run):
    """losses.json, in which block 1 is behind at the boundary."""
    edge = run.block(1).identity.edges[1]
    rows = [(15.0, 0, False, 0.5), (edge, 0, True, 0.4), (edge, 1, True, 0.6), (1.0, 1, False, 0.3)]
    run.store.write_json(
        "losses.json",
        [
            {"level": level, "block": b, "boundary": at, "loss": loss, "weighted": 2 * loss, "level_name": "sigma"}
            for level, b, at, loss in rows
        ],
    )


def failed(run, block, error):
    """The coordinator gave a block up."""
    state = {"block": block, "phase": "failed", "since": time.time(), "error": error}
    run.block(block).store.write_json("state.json", state)


def ablation(run):
    folder = Path(run.store.path).parent / "toy-ablation"
    folder.mkdir()
    rows = [
        {
            "blocks": blocks,
            "ranges": "paper",
            "partition": "even",
            "seeds": [0, 1],
            "scores": {"test": {"mean": {"mean": mean, "std": 0.01}}, "validation": {}},
            "memory": 1 << 20,
            "seconds": 1.0,
            "flops": 1e9,
        }
        for blocks, mean in ((1, 0.8), (2, 0.77))
    ]
    (folder / "ablation.json").write_text(json.dumps(rows))
