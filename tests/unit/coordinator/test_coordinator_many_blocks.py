"""What the controller does for hundreds of blocks grows with them, not with their square: counted, not timed."""

from collections import Counter
from types import SimpleNamespace

import pytest

from dbtrain.coordinator import controller as conduct
from dbtrain.coordinator import placement
from dbtrain.coordinator.controller import READ_AT_A_POLL, Controller
from dbtrain.coordinator.lifecycle import Phase
from dbtrain.coordinator.placement import Node, Room, place
from dbtrain.run.requests import Request, requests
from dbtrain.run.run import Run
from dbtrain.shards.storage.local import LocalFiles
from dbtrain.telemetry.console import Row, most_telling
from dbtrain.telemetry.events import EventLog

BLOCKS, DEATHS, NODES = 200, 50, 25
pytestmark = pytest.mark.timeout(120)


class Enough(Exception):
    """The test has seen what it wants."""


class Attempt:
    """A worker that lives until the test says how it died."""

    error = None

    @property
    def over(self):
        return self.error is not None


class Cluster:
    def __init__(self, run):
        self.run, self.live, self.started = run, {}, []

    def nodes(self):
        return [Node(f"n{i}", {"CPU": BLOCKS // NODES}) for i in range(NODES)]

    def start(self, assignment, request, name):
        attempt = self.run.block(assignment.block).attempt(assignment.attempt)
        log = EventLog(attempt)
        log.emit("start")
        log.emit("ready", step=0)
        self.started.append(assignment.block)
        self.live[assignment.block] = Attempt()
        return self.live[assignment.block]


@pytest.fixture
def counted(make_run, monkeypatch):
    """A controller of many blocks, and what it does between two calls of `act`, which gets the poll's number."""
    monkeypatch.setattr(conduct, "POLL_S", 0.0)
    config, store = make_run(f"blocks={BLOCKS}", f"model.depth={BLOCKS}")
    run, done = Run(store), Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def counting(*arguments):
            done[name] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in ((LocalFiles, "size"), (LocalFiles, "write"), (placement, "_holds")):
        count(owner, name)
    cluster = Cluster(run)

    def go(act):
        polls = []

        def show(states, progress):
            polls.append(Counter(done))
            done.clear()
            act(len(polls), controller)

        watching = SimpleNamespace(show=show, tell=lambda line: None, event=lambda block, event: None)
        controller = Controller(run, config, cluster, requests(config, "cpu"), watching)
        with pytest.raises(Enough):
            controller.run()
        return controller, cluster, polls

    return go


def test_a_poll_of_many_blocks_does_little_and_many_deaths_are_replaced_in_one(counted):
    first_dead = 10

    def act(poll, controller):
        if poll == first_dead:
            assert {state.phase for state in controller.states} == {Phase.RUNNING}
            for block in range(BLOCKS - DEATHS, BLOCKS):
                controller.cluster.live[block].error = "RuntimeError: CUDA error"
        if poll == first_dead + 2:
            raise Enough

    controller, cluster, polls = counted(act)
    assert sorted(cluster.started[:BLOCKS]) == list(range(BLOCKS))
    # noticed at the next poll, whoever's turn it is to be read, and placed anew at the one after it
    assert sorted(cluster.started[BLOCKS:]) == list(range(BLOCKS - DEATHS, BLOCKS))
    starting, quiet, died, replaced = polls[0], polls[first_dead - 1], polls[first_dead], polls[first_dead + 1]
    assert quiet["size"] <= READ_AT_A_POLL and not quiet["write"] and not quiet["_holds"]
    # of each death one state; of each placement its owner and its state, and the ready that was read since
    assert died["write"] <= DEATHS and replaced["write"] <= 2 * DEATHS + READ_AT_A_POLL
    assert starting["_holds"] <= 2 * (BLOCKS + NODES)
    assert replaced["_holds"] <= 2 * (BLOCKS + NODES)


def test_each_block_is_read_in_its_turn(counted):
    seen = []

    def act(poll, controller):
        seen.append(sum(state.phase is Phase.RUNNING for state in controller.states))
        if poll == BLOCKS // READ_AT_A_POLL:
            raise Enough

    counted(act)
    assert seen == [READ_AT_A_POLL * (poll + 1) for poll in range(BLOCKS // READ_AT_A_POLL)]


def ask(block, cpus, workers=1):
    return Request(block, workers, {"CPU": cpus}, None, "cpu")


def test_room_that_a_smaller_block_leaves_is_found_by_one_that_comes_later():
    nodes = [Node("a", {"CPU": 3}), Node("b", {"CPU": 4})]
    wanted = [ask(0, 2), ask(1, 2), ask(2, 4), ask(3, 1), ask(4, 2, 2), ask(5, 2), ask(6, 1)]
    where = place(wanted, nodes)
    assert where == {0: ["a"], 1: ["b"], 2: None, 3: ["a"], 4: None, 5: ["b"], 6: None}


def test_workers_that_do_not_all_fit_give_back_what_the_first_of_them_took():
    room = Room([Node("a", {"CPU": 3}), Node("b", {"CPU": 1})])
    assert room.take(ask(0, 2, workers=2)) is None
    assert room.take(ask(1, 2)) == ["a"]
    assert room.take(ask(2, 1, workers=2)) == ["a", "b"]


def test_a_table_that_is_longer_than_the_screen_shows_what_died_first_and_counts_the_rest():
    def row(number, phase):
        return Row(f"block {number}", (0, 1), (0.0, 1.0), phase, 0, 9, None, None, 0.0, None, 0)

    phases = ["done", "running", "done", "failed", "pending", "running", "lost"]
    rows = [row(number, phase) for number, phase in enumerate(phases)]
    assert most_telling(rows, 7) == (rows, None)
    shown, line = most_telling(rows, 3)
    assert [r.name for r in shown] == ["block 1", "block 3", "block 6"]
    assert line == "7 rows, 4 not shown: 2 done, 2 running, 1 failed, 1 pending, 1 lost"
