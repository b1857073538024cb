"""Blocks of unequal length and batch, two of them killed on the way: the bits of a run that nothing happened to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TRAIN, Command, events, shards

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(900)]

OWN = "training.blocks={0: {steps: 73, batch_size: 11}, 2: {steps: 41, batch_size: 21, ema: 0}}"
LENGTHS = (73, 60, 41)
FAULTS = [{"block": 0, "step": 66, "kind": "kill"}, {"block": 2, "step": 40, "kind": "kill_in_commit"}]


def last_shards(run: Path) -> dict[str, bytes]:
    """Of every block at its own last step."""
    found = [shards(run, steps) for steps in LENGTHS]
    return {k: v for block, own in enumerate(found) for k, v in own.items() if k.startswith(f"{block:02d}/")}


def test_killed_blocks_of_unequal_length_end_with_the_bits_of_undisturbed_ones(
    dbtrain: Callable[..., Command], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    whole = dbtrain(*TRAIN, OWN, "out=whole")
    assert whole.wait(600) == 0, whole.output()
    killed = dbtrain(*TRAIN, OWN, "out=killed", faults=FAULTS)
    assert killed.wait(600) == 0, killed.output()
    run = tmp_path / "killed" / "run"
    resumed = [[e["step"] for e in events(run, block) if e["event"] == "resumed"] for block in range(3)]
    assert resumed == [[60], [], [30]], killed.output()
    wanted = last_shards(tmp_path / "whole" / "run")
    assert len(wanted) == 8  # model and optim of three blocks, ema of two
    assert last_shards(run) == wanted
    # the block without exceptions is the one of the run in which no block has any
    assert {k: v for k, v in wanted.items() if k[:2] == "01"} == {k: v for k, v in expected.items() if k[:2] == "01"}
    told = " ".join(killed.output().split())
    assert all(f"block {block}: done at step {steps}" in told for block, steps in enumerate(LENGTHS)), told
