"""A run that branches: its one network first, then the blocks from it, whatever is killed meanwhile."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CONFIG, TINY, Command, events, shards, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

STEPS, BRANCH_STEPS = 20, 25
RUN = [
    "train",
    CONFIG,
    "name=run",
    "blocks=2",
    *TINY,
    "model.depth=2",
    "cluster.cpus_per_worker=0.5",
    f"training.steps={STEPS}",
    f"init.branch.steps={BRANCH_STEPS}",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    command = Command(folder, RUN)
    assert command.wait() == 0, command.output()
    return folder / "runs/run"


def everything(run: Path) -> dict[str, bytes]:
    branch = {f"branch/{name}": data for name, data in shards(run / "branch", BRANCH_STEPS).items()}
    return {**branch, **shards(run, STEPS)}


def test_a_command_and_workers_that_are_killed_change_no_bit_of_branch_and_blocks(
    whole: Path, dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    run = tmp_path / "runs/run"
    first = dbtrain(*RUN, faults=[{"block": "branch", "step": 12, "kind": "hang"}])
    wait_for(lambda: (run / "branch/blocks/00/step_00000010/COMMIT.json").exists(), 240, "the branch's first commit")
    status = dbtrain("status", "runs/run")
    assert status.wait() == 0
    told = status.output()
    assert "branch" in told and "10/25" in told and told.count("pending") >= 2, told
    first.kill()
    faults = [
        {"block": "branch", "step": 17, "kind": "kill"},
        {"block": "branch", "step": 20, "kind": "kill_in_commit"},
        {"block": 0, "step": 3, "kind": "kill"},  # before its first commit, so that it starts from the branch again
        {"block": 1, "step": 13, "kind": "kill"},
    ]
    again = dbtrain("resume", "runs/run", faults=faults)
    assert again.wait() == 0, again.output()
    assert [e["step"] for e in events(run / "branch", 0) if e["event"] == "resumed"] == [10, 10, 10]
    assert [e["step"] for e in events(run, 1) if e["event"] == "resumed"] == [10]
    found, expected = everything(run), everything(whole)
    assert len(expected) == 9 and found == expected
    for arguments in (["status", "runs/run"], ["eval", "runs/run"], ["inspect", "runs/run/branch"]):
        command = dbtrain(*arguments)
        assert command.wait() == 0, command.output()
