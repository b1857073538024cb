"""A run that starts from another run's weights: killed before its first commit and after, it ends in the same bits."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CONFIG, TINY, Command, events, shards

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(1800)]

STEPS = 20
SIZES = [CONFIG, "blocks=2", *TINY, "cluster.cpus_per_worker=0.5"]  # of two layers and of one
# trained jointly the network has one stem, which the blocks of another run then keep
SOURCE = ["train", *SIZES, "name=source", "method=joint", "training.steps=10"]
START = ["train", *SIZES, "name=start", "init.from=runs/source", "init.stem=frozen", f"training.steps={STEPS}"]
KILLS = [{"block": 0, "step": step, "kind": "kill"} for step in (4, 15)] + [{"block": 1, "step": 7, "kind": "kill"}]


def done(folder: Path, arguments: list[str], faults: list[dict[str, object]] | None = None) -> str:
    command = Command(folder, arguments, faults or [])
    try:
        assert command.wait(900) == 0, command.output()
        return command.output()
    finally:
        command.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Folder with the source, the run that nothing happened to, and below `killed` the one that was killed."""
    folder = tmp_path_factory.mktemp("init")
    done(folder, SOURCE)
    said = done(folder, START)
    done(folder, [*START, "out=killed"], KILLS)
    yield folder, said


def test_the_shards_are_those_of_the_undisturbed_run(runs: tuple[Path, str]) -> None:
    folder, said = runs
    expected = shards(folder / "runs" / "start", STEPS)
    assert len(expected) == 6 and shards(folder / "killed" / "start", STEPS) == expected
    assert "init: block 0: layers 0-1 of" in said and "with the run's frozen stem and the head of its block 0" in said


def test_weights_are_taken_at_every_start_without_a_commit_and_at_no_other(runs: tuple[Path, str]) -> None:
    killed = runs[0] / "killed" / "start"
    told = {b: [e["event"] for e in events(killed, b) if e["event"] in ("initialised", "resumed")] for b in (0, 1)}
    assert told == {0: ["initialised", "initialised", "resumed"], 1: ["initialised", "initialised"]}


def test_it_is_merged_verified_and_evaluated_without_its_source(runs: tuple[Path, str]) -> None:
    folder, _ = runs
    alone = folder / "alone"
    shutil.copytree(folder / "killed" / "start", alone / "runs" / "start")
    assert "equals the blocks bit for bit" in done(alone, ["merge", "runs/start"])
    assert "whole" in done(alone, ["inspect", "runs/start"])
    done(alone, ["eval", "runs/start"])
    index = json.loads((alone / "runs/start/merged/model.safetensors.index.json").read_text())
    assert {file for name, file in index["weight_map"].items() if name.startswith("stem.")} == {"frozen.safetensors"}
