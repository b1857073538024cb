"""Real runs of several workers a block, killed once: the shards are those of the run that nothing happened to.

No width, class count or batch divides by the workers: each has padding, and parameters of which it holds nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command, events, shards

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = 12
TRAINING = [
    "training.checkpoint_every=5",
    "training.log_every=3",
    "cluster.backoff_s=0.1",
    "cluster.cpus_per_worker=0.3",
]
NOISE = ["noise.ranges=uniform", "noise.sigma_min=0.5", "noise.sigma_max=20"]
MUON = ["training.optimizer.name=muon", "training.optimizer.clip=0"]
MODELS = {
    "vit_digits": ["model.dim=18", "model.heads=2", "model.patch=4", "codebook.dim=18", *NOISE],
    "dit_digits": ["model.dim=18", "model.heads=3", "model.patch=4"],
    "ar_tiny": ["model.dim=22", "model.heads=1", "codebook.dim=22", "codebook.source=random", "data.length=13", *NOISE],
    "masked_tiny": ["model.dim=22", "model.heads=1", "data.length=13"],
    "recurrent_tiny": ["model.dim=22", "model.heads=1", "codebook.dim=22", "codebook.source=random", *NOISE],
}
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling Muon's kernels for each worker takes minutes on two cores."""
LONG = pytest.mark.long
RUNS = [
    ("ar_tiny", 3, 3, "kill_in_commit", ["training.precision=bf16", "training.micro_batch=3"]),
    pytest.param("vit_digits", 3, 3, "kill", [], marks=LONG),
    pytest.param("vit_digits", 1, 2, "kill", MUON, marks=LONG),
    pytest.param("ar_tiny", 2, 3, "kill_in_commit", ["training.precision=bf16", "training.micro_batch=3"], marks=LONG),
    pytest.param("masked_tiny", 3, 2, "kill", MUON, marks=LONG),
    pytest.param("dit_digits", 1, 3, "kill", ["training.offload=optimizer"], marks=LONG),
    pytest.param("recurrent_tiny", 2, 2, "kill", [*MUON, "training.offload=optimizer"], marks=LONG),
    pytest.param("vit_digits", 3, 2, "kill", ["training.offload=all", "training.micro_batch=3"], marks=LONG),
    pytest.param("ar_tiny", 0, 3, "kill_in_commit", [*MUON, "training.precision=bf16"], marks=LONG),
]


def arguments(config: str, blocks: int, stage: int, workers: int, more: Sequence[str] = ()) -> list[str]:
    shape = ["model.depth=2", f"blocks={blocks}", f"training.steps={STEPS}", "training.batch_size=18"]
    sharing = [f"training.zero_stage={stage}", f"cluster.workers={workers}"]
    path = str(ROOT / "configs" / f"{config}.yaml")
    return ["train", path, "name=run", *shape, *MODELS[config], *TRAINING, *sharing, *more]


@pytest.mark.parametrize(("config", "stage", "workers", "kind", "more"), RUNS)
def test_a_killed_block_ends_with_the_bits_of_an_undisturbed_one(
    dbtrain: Callable[..., Command], tmp_path: Path, config: str, stage: int, workers: int, kind: str, more: list[str]
) -> None:
    told = arguments(config, 1, stage, workers, more)
    whole = dbtrain(*told, "out=whole", **EAGER)
    assert whole.wait(600) == 0, whole.output()
    step = 8 if kind == "kill" else 10
    killed = dbtrain(*told, "out=killed", faults=[{"block": 0, "step": step, "kind": kind}], **EAGER)
    assert killed.wait(600) == 0, killed.output()
    seen = [event["step"] for event in events(tmp_path / "killed/run", 0) if event["event"] == "resumed"]
    assert seen == [5], killed.output()
    expected = shards(tmp_path / "whole/run", STEPS)
    assert len(expected) == 3
    assert shards(tmp_path / "killed/run", STEPS) == expected


@pytest.mark.long  # tests/resume/test_covering_array.py shows the same of the engine, in every row
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_gradient_that_is_infinite_on_one_worker_fails_its_block_alone(
    dbtrain: Callable[..., Command], tmp_path: Path, stage: int
) -> None:
    """DeepSpeed skips such a step without a word; it must not be counted, nor anything after it."""
    command = dbtrain(
        *arguments("vit_digits", 2, stage, 2), faults=[{"block": 1, "step": 6, "kind": "gradient"}]
    )  # fmt: skip
    assert command.wait(600) == 1, command.output()
    told = " ".join(command.output().split())
    assert "the gradient norm of step 7 is inf" in told and "1 of 2 blocks are done" in told
    assert "Traceback" not in told
    run = tmp_path / "runs/run"
    # the other block has gone on, and let that step go
    assert sorted(shards(run, 5)) == ["01/ema.safetensors", "01/model.safetensors", "01/optim.safetensors"]
    assert sorted(shards(run, STEPS)) == [
        "00/ema.safetensors",
        "00/model.safetensors",
        "00/optim.safetensors",
    ]
    assert [event["event"] for event in events(run, 1)].count("start") == 1
