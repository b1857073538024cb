"""A command that trains a branch first, and is asked to stop meanwhile."""

from types import SimpleNamespace

import pytest

from dbtrain.coordinator import train
from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.coordinator.placement import Node
from dbtrain.coordinator.status import branch_status
from dbtrain.errors import IncompleteRunError
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never


@pytest.fixture
def branched(make_config, tmp_path):
    run = Run(Store(tmp_path / "toy"))
    return run, prepare(make_config("init.branch.steps=30"), run, never)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (Phase.DONE, "the branch is done, and no block has begun. The same command continues with them."),
        (Phase.STOPPED, "no block has begun. branch stopped at step 7 .* The same command continues it, and then"),
    ],
)
def test_a_stop_is_heard_though_the_branch_comes_to_its_end(branched, monkeypatch, phase, words):
    run, run_plan = branched

    class Controller:
        """Of an attempt that a signal met in its last steps."""

        def __init__(self, *_):
            self.states, self.stopping = [BlockState(0)], True

        def run(self):
            return [BlockState(0, phase, committed=7, error="SIGTERM")]

    monkeypatch.setattr(train, "Controller", Controller)
    cluster = SimpleNamespace(nodes=lambda: [Node("a", {"CPU": 8.0})], check_alive=lambda: None)
    view = SimpleNamespace(tell=lambda line: None)
    start = train.Start(cluster, view, SimpleNamespace(check=lambda: None), "here", None)
    with pytest.raises(IncompleteRunError, match=words):
        train._train_in_order(run, run_plan, start)


def test_the_row_of_a_branch_that_has_not_begun(branched):
    run, run_plan = branched
    row = branch_status(run).row
    assert (row.name, row.layers, row.step, row.steps, row.phase) == ("branch", (0, 2), 0, 30, "pending")
    assert row.levels == (run_plan.ranges.edges[-1], run_plan.ranges.edges[0])
