"""Blocks of unequal length and batch: none changes another, and a kill changes nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import TRAIN, Command, events, shards

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(900)]

OWN = "training.blocks={0: {steps: 73, batch_size: 11}, 2: {steps: 41, batch_size: 21, ema: 0}}"
LENGTHS = (73, 60, 41)
FAULTS = [{"block": 0, "step": 66, "kind": "kill"}, {"block": 2, "step": 40, "kind": "kill_in_commit"}]


def last_shards(run: Path, block: int) -> dict[str, bytes]:
    """Of a block at its own last step."""
    return {name: data for name, data in shards(run, LENGTHS[block]).items() if name.startswith(f"{block:02d}/")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory of a run of such blocks that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder, [*TRAIN, OWN])
    try:
        assert command.wait(600) == 0, command.output()
    finally:
        command.kill()
    yield folder / "runs" / "run"


def test_killed_blocks_of_unequal_length_end_with_the_bits_of_undisturbed_ones(
    dbtrain: Callable[..., Command], tmp_path: Path, whole: Path
) -> None:
    killed = dbtrain(*TRAIN, OWN, "out=killed", faults=FAULTS)
    assert killed.wait(600) == 0, killed.output()
    run = tmp_path / "killed" / "run"
    resumed = [[e["step"] for e in events(run, block) if e["event"] == "resumed"] for block in range(3)]
    assert resumed == [[60], [], [30]], killed.output()
    for block, files in enumerate((3, 3, 2)):  # model and optim, and ema but for the last
        wanted = last_shards(whole, block)
        assert len(wanted) == files and last_shards(run, block) == wanted
    told = " ".join(killed.output().split())
    assert all(f"block {block}: done at step {steps}" in told for block, steps in enumerate(LENGTHS)), told


def test_a_block_has_the_bits_of_a_run_in_which_all_blocks_are_like_it(
    dbtrain: Callable[..., Command], tmp_path: Path, whole: Path, expected: dict[str, bytes]
) -> None:
    """Its own steps, batch and schedule are those of a whole run, and the block without exceptions keeps its bits."""
    # 50 of 60 steps of warm-up are 61 of 73
    alike = ["training.steps=73", "training.batch_size=11", "training.optimizer.warmup=61"]
    command = dbtrain(*TRAIN, *alike, "--blocks", "0")
    assert command.wait(600) == 0, command.output()
    assert last_shards(whole, 0) == last_shards(tmp_path / "runs" / "run", 0)
    assert last_shards(whole, 1) == {name: data for name, data in expected.items() if name.startswith("01/")}
