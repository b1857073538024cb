"""The tiny configurations of masked diffusion and recurrent depth: train, die, resume bitwise, merge, evaluate."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command, shards

SMALLER = [
    "name=run",
    "model.dim=32",
    "data.length=32",
    "training.steps=24",
    "training.batch_size=16",
    "training.checkpoint_every=8",
    "training.log_every=4",
    "cluster.backoff_s=0.1",
    "evaluation.steps_per_block=2",
]
RANGE = ["noise.ranges=uniform", "noise.sigma_min=0.5", "noise.sigma_max=20"]

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("config", "changes", "readouts"),
    [
        ("masked_tiny", ["blocks=2", "model.depth=2"], {"total", "block_0", "block_1"}),
        ("recurrent_tiny", RANGE, {"chain", "mean", "first"}),
    ],
    ids=["masked", "recurrent"],
)
def test_train_die_resume_merge_and_evaluate(
    config: str, changes: list[str], readouts: set[str], dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    arguments = ["train", str(ROOT / "configs" / f"{config}.yaml"), *SMALLER, *changes]
    undisturbed = dbtrain(*arguments, "out=whole", "--blocks", "0")
    assert undisturbed.wait() == 0, undisturbed.output()
    killed = dbtrain(*arguments, "out=killed", faults=[{"block": 0, "step": 13, "kind": "kill"}])
    assert killed.wait() == 0, killed.output()
    assert len(list((tmp_path / "killed/run/blocks/00/attempts").iterdir())) == 2
    expected = shards(tmp_path / "whole" / "run", 24)
    assert len(expected) == 3 and expected.items() <= shards(tmp_path / "killed" / "run", 24).items()
    assert "bit for bit" in killed.output()
    evaluated = dbtrain("eval", "killed/run")
    assert evaluated.wait() == 0, evaluated.output()
    scores = json.loads((tmp_path / "killed/run/evaluation.json").read_text())["scores"]["test"]
    assert readouts <= scores.keys()
    # better than guessing among 27 letters by 24 small steps, and no likelihood that is too good
    assert all(1 < scores[name] < 4.75 for name in readouts & {"total", "chain", "mean", "first"})
