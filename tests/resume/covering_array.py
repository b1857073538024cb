"""Run by torchrun: blocks of all architectures resume under a pairwise covering array of what a worker can be set to.

Shapes divide by nothing: odd widths, 7 classes, a vocabulary of 29. Argument: where to write one JSON object a row.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbtrain.config import Config, parse_config
from dbtrain.run.make_plan import design
from dbtrain.run.plan import RunPlan
from dbtrain.training.engine import Engine
from tests.process_group import process_group

Row = tuple[str, int, int, str, str, str, int, str]
Parts = dict[str, dict[str, Tensor]]
FACTORS: dict[str, tuple[Any, ...]] = {
    "arch": ("vit", "dit", "ar_lm", "masked_lm", "recurrent"),
    "zero_stage": (0, 1, 2, 3),
    "workers": (1, 2, 3),
    "offload": ("none", "optimizer", "all"),
    "optimizer": ("adamw", "muon"),
    "precision": ("fp32", "bf16"),
    "accumulation": (1, 2),
    "layers": ("once", "looped"),
}
# found once by a greedy search over random candidates; test_covering_array.py proves that every pair is there
ROWS: tuple[Row, ...] = (
    ("ar_lm", 0, 1, "none", "adamw", "bf16", 2, "once"),
    ("masked_lm", 0, 1, "none", "muon", "fp32", 1, "once"),
    ("ar_lm", 1, 1, "optimizer", "muon", "fp32", 1, "once"),
    ("vit", 2, 1, "optimizer", "muon", "bf16", 2, "once"),
    ("dit", 3, 1, "optimizer", "adamw", "bf16", 1, "looped"),
    ("recurrent", 3, 1, "none", "muon", "bf16", 2, "once"),
    ("dit", 3, 1, "all", "adamw", "fp32", 2, "once"),
    ("dit", 0, 2, "none", "muon", "fp32", 2, "once"),
    ("vit", 0, 2, "none", "adamw", "fp32", 2, "looped"),
    ("masked_lm", 1, 2, "none", "adamw", "bf16", 1, "looped"),
    ("recurrent", 1, 2, "none", "adamw", "bf16", 2, "once"),
    ("recurrent", 2, 2, "optimizer", "adamw", "fp32", 1, "once"),
    ("dit", 2, 2, "none", "muon", "fp32", 2, "once"),
    ("vit", 3, 2, "all", "adamw", "fp32", 2, "once"),
    ("ar_lm", 3, 2, "all", "muon", "bf16", 2, "looped"),
    ("recurrent", 0, 3, "none", "muon", "fp32", 1, "once"),
    ("dit", 1, 3, "none", "muon", "fp32", 2, "once"),
    ("vit", 1, 3, "none", "muon", "fp32", 1, "once"),
    ("masked_lm", 2, 3, "optimizer", "adamw", "bf16", 2, "looped"),
    ("ar_lm", 2, 3, "optimizer", "muon", "fp32", 1, "once"),
    ("masked_lm", 3, 3, "all", "muon", "bf16", 1, "once"),
    ("recurrent", 3, 3, "all", "muon", "fp32", 1, "once"),
)
MICRO, CUT, STEPS = 2, 2, 4
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"depth": 2, "dim": 18, "heads": 2, "patch": 2},
    "dit": {"depth": 2, "dim": 18, "heads": 3, "patch": 2},
    "ar_lm": {"depth": 2, "dim": 22, "heads": 1, "level_dim": 6},
    "masked_lm": {"depth": 2, "dim": 22, "heads": 1, "level_dim": 6},
    "recurrent": {"depth": 1, "prelude": 1, "coda": 1, "dim": 22, "heads": 1, "level_dim": 6},
}
LOOPS: dict[str, list[int] | None] = {"once": None, "looped": [2, 2]}
IMAGES = {"image": (1, 6, 10), "classes": 7}
TEXT = {"vocabulary": 29, "length": 11}


def config_of(row: Row) -> Config:
    arch, stage, workers, offload, optimizer, precision, accumulation, layers = row
    images = arch in ("vit", "dit")
    return parse_config(
        {
            "name": "array",
            "blocks": 1,
            "model": {"arch": arch, **MODELS[arch], "loops": LOOPS[layers]},
            "data": {"source": "digits"} if images else {"source": "python_topics", "tokenizer": "letters"},
            "codebook": {"source": "random", "dim": MODELS[arch]["dim"]},
            "noise": {"ranges": {"dit": "paper", "masked_lm": "alpha"}.get(arch, "uniform")},
            "training": {
                "batch_size": MICRO * workers * accumulation,
                "zero_stage": stage,
                "offload": offload,
                "precision": precision,
                "ema": 0.9,
                "optimizer": {"name": optimizer, "clip": 0.0 if optimizer == "muon" else 1.0, "lr": 0.01},
            },
        },
        "the covering array",
    )


def make(run_plan: RunPlan, row: Row) -> Engine:
    return Engine(run_plan.objective(0), run_plan.config.training, MICRO, row[6], row[2])


def batch(step: int, positions: Tensor, images: bool) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1000 * step + int(positions[0]))
    count = len(positions)
    if images:
        label = torch.randint(IMAGES["classes"], (count,), generator=draws)
        return {"image": torch.randn(count, *IMAGES["image"], generator=draws), "label": label}
    return {"tokens": torch.randint(TEXT["vocabulary"], (count, TEXT["length"]), generator=draws)}


def advance(engine: Engine, row: Row, start: int, stop: int) -> Parts:
    for step in range(start, stop):
        engine.set_lr(1.0)
        for micro in range(row[6]):
            positions = torch.arange(MICRO) + MICRO * (dist.get_rank() * row[6] + micro)
            engine.accumulate(batch(step, positions, row[0] in ("vit", "dit")), torch.tensor(step), positions)
        engine.update_ema(step + 1)
    assert engine.gradient_norm.isfinite() and engine.non_finite() is None
    shared = [engine.snapshot().parts]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def case(row: Row) -> dict[str, Any]:
    data: Any = SimpleNamespace(shape=IMAGES if row[0] in ("vit", "dit") else TEXT)
    run_plan = design(config_of(row), data, None)  # type: ignore[arg-type]
    whole = make(run_plan, row)
    middle = advance(whole, row, 0, CUT)
    end = advance(whole, row, CUT, STEPS)
    resumed = make(run_plan, row)
    resumed.restore(middle, CUT)
    again = advance(resumed, row, CUT, STEPS)
    moved = [not torch.equal(middle[part][name], end[part][name]) for part in end for name in end[part]]
    return {
        "row": row,
        "differs": [f"{p} {n}" for p in end for n in end[p] if not torch.equal(end[p][n], again[p][n])],
        "moved": sum(moved) / len(moved),
        "infinite": infinite(resumed, row),
    }


def infinite(engine: Engine, row: Row) -> str:
    """What is seen of a gradient of inf on the last worker alone."""
    if dist.get_rank() == row[2] - 1:
        parameter = next(p for p in engine._parameters.values())
        parameter.register_hook(lambda gradient: gradient + float("inf"))
    for micro in range(row[6]):
        positions = torch.arange(MICRO) + MICRO * micro
        engine.accumulate(batch(STEPS, positions, row[0] in ("vit", "dit")), torch.tensor(STEPS), positions)
    seen: list[Any] = [None] * row[2]
    dist.all_gather_object(seen, bool(engine.gradient_norm.isfinite()))
    return "unseen" if any(seen) else "seen"


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # as a worker does, and fills what it does not write
    with open(sys.argv[1] if dist.get_rank() == 0 else "/dev/null", "w") as out:
        for row in ROWS:
            if row[2] == dist.get_world_size():
                out.write(json.dumps(case(row)) + "\n")
                out.flush()


if __name__ == "__main__":
    with process_group():
        main()
