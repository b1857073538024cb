"""Runs for reports: settled, committed and told by events, without any training."""

import io
import json
import time
from pathlib import Path

from PIL import Image

from dbtrain.evaluation.images.drawn import Drawn, as_text
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
    log.emit("start", rank=0, pid=1, host="node", node="3f9abcde", address="10.0.0.7", device="cpu")
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


def measured(run, weights=""):
    """losses.json, in which block 1 is behind at the boundary."""
    edge = run.block(1).identity.edges[1]
    rows = [(15.0, 0, False, 0.5), (edge, 0, True, 0.4), (edge, 1, True, 0.6), (1.0, 1, False, 0.3)]
    run.store.write_json(
        "losses.json",
        [
            {
                "level": level, "block": b, "boundary": at, "loss": loss, "weighted": 2 * loss, "level_name": "sigma",
                "weights": weights,
            }
            for level, b, at, loss in rows
        ],
    )  # fmt: skip


def sampled(run, text=True, **changes):
    """samples.png, drawn by Heun in 4 steps, one of them in the slice of block 1; or one that says nothing."""
    steps = ((20.0, 0), (9.0, 0), (4.0, 0), (1.0, 1))
    how = {"weights": "", "solver": "heun", "guidance": 1.0, "seed": 7, "level_name": "sigma", "steps": steps}
    drawn = Drawn(**{**how, "edges": (20.0, 2.3664319, 0.5), **changes})
    picture = io.BytesIO()
    Image.new("L", (40, 40)).save(picture, format="PNG", pnginfo=as_text(drawn) if text else None)
    run.store.write("samples.png", picture.getvalue())


def swept(run, weights):
    """sweep.json of two layers."""
    row = {
        "r": 0.5,
        "p": 0.1,
        "low": 0.4,
        "high": 0.6,
        "spearman": 0.5,
        "order_r": None,
        "order_p": None,
        "probe": 0.9,
        "arc": None,
    }
    one = {
        "name": "classes", "order": "none", "labels": list("abcd"), "prompts": 8, "exact": True, "behaviour_r": None,
        "behaviour_p": None, "significant": False, "arc_band": None, "layers": [{"layer": n, **row} for n in (1, 2)],
    }  # fmt: skip
    whole = {"model": "toy", "behaviour": "vocabulary", "pca": 64, "seed": 0, "sets": [one], "phases": []}
    run.store.write_json("sweep.json", {**whole, "weights": weights})


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
