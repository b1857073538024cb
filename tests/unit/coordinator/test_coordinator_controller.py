from types import SimpleNamespace

import pytest
import torch

from dbtrain.coordinator import block_records as records
from dbtrain.coordinator import controller as conduct
from dbtrain.coordinator.controller import Controller
from dbtrain.coordinator.exit_reasons import KILLED
from dbtrain.coordinator.lifecycle import Phase
from dbtrain.coordinator.placement import Node
from dbtrain.coordinator.status import status
from dbtrain.coordinator.train import row
from dbtrain.errors import FencedError, PlacementError, RunLockedError, ShardError
from dbtrain.run.requests import requests
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.fence import check
from dbtrain.shards.storage.lock import RunLock
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import COORDINATOR, EventLog, EventTail
from dbtrain.training.watchdog import STOP

STEPS = 4
pytestmark = pytest.mark.timeout(120)


class Attempt:
    """A worker that plays its part at once and is over after some polls, or when it is asked to stop."""

    def __init__(self, cluster, assignment, part):
        self.cluster, self.assignment = cluster, assignment
        self.run = Store(assignment.run_url)
        self.store = self.run.child("blocks", f"{assignment.block:02d}")
        self.log = EventLog(self.store.child("attempts", str(assignment.attempt)))
        self.error, self.polls, self.waits = None, 3, False
        if assignment.block in cluster.silent:  # it is held back: no worker ever starts
            self.waits, self.run = True, Store(f"{assignment.run_url}-nobody")
            return
        if part is die_in_the_start:
            crash(self)
            return
        self.log.emit("start")
        part(self)

    def train(self, *steps):
        self.log.emit("ready", step=steps[0] - 1)
        for step in steps:
            self.log.emit("step", step=step, loss=1.0 / step, seconds=0.5, steps=1, memory=2**20)

    def commit(self, step):
        block, manifest = self.assignment.block, read_manifest(self.run)
        checkpoints = Checkpoints(self.store, manifest.identity(block))
        parts = {"model": {f"blocks.{block}.stem.w": torch.full((2,), float(step))}}
        fence = lambda: check(self.store, self.assignment.token)  # noqa: E731
        checkpoints.commit(step, parts, loss=0.5, attempt=self.assignment.attempt, fence=fence)

    def end(self, outcome, **fields):
        self.log.emit("end", outcome=outcome, reason=fields.pop("reason", None), **fields)

    @property
    def over(self):
        self.polls -= 1
        if self.waits and self.run.exists(STOP):
            request = self.run.read_json(STOP)
            assert request["session"] == self.assignment.session
            self.commit(2)
            self.end("stopped", reason=request["reason"])
            self.waits, self.polls = False, 0
        if self.waits or self.polls > 0:
            return False
        self.cluster.live.discard(self.assignment.block)
        return True


class Cluster:
    """Nodes, and for each block the parts that its attempts play, the last one for all that follow."""

    silent = ()

    def __init__(self, parts, cpus=8):
        self.parts, self.machines = parts, [Node("a", {"CPU": cpus})]
        self.started, self.live, self.most = [], set(), 0

    def nodes(self):
        return self.machines

    def start(self, assignment, request, name):
        block = assignment.block
        assert block not in self.live and request.block == block
        self.started.append(assignment)
        self.live.add(block)
        self.most = max(self.most, len(self.live))
        parts = self.parts.get(block, [finish])
        before = sum(a.block == block for a in self.started) - 1
        return Attempt(self, assignment, parts[min(before, len(parts) - 1)])

    def attempts(self, block):
        return [a.attempt for a in self.started if a.block == block]


def finish(attempt):
    attempt.train(*range(1, STEPS + 1))
    attempt.commit(STEPS)
    attempt.end("done")


def crash(attempt):
    attempt.error = "RuntimeError: CUDA error: an illegal memory access"


def die_in_the_start(attempt):
    raise AssertionError("no worker ever plays it")


def crash_after(step):
    def part(attempt):
        attempt.train(*range(1, step + 1))
        attempt.commit(step)
        crash(attempt)

    return part


def lose_node(attempt):
    attempt.error = "RayActorError: the node on which the worker ran died"


def preempt(attempt):
    attempt.train(1)
    attempt.commit(1)
    attempt.end("stopped", reason="SIGTERM")


def fail(attempt):
    attempt.train(1)
    attempt.end("failed", error="the loss of step 1 is nan", retry=False)


def wait(attempt):
    attempt.train(1)
    attempt.waits = True


@pytest.fixture
def bring(make_run, monkeypatch):
    """Conduct a run on a fake cluster: (controller, cluster, lines told)."""
    monkeypatch.setattr(conduct, "POLL_S", 0.002)
    runs = {}

    def go(parts, *overrides, cpus=8, act=lambda controller: None, guard=lambda: None, only=None):
        config, run = runs.get(overrides) or make_run(*overrides)
        runs[overrides] = config, run
        told, cluster = [], Cluster(parts, cpus)
        watching = SimpleNamespace(
            show=lambda states, progress: act(controller), tell=told.append, event=lambda block, event: None
        )
        controller = Controller(Run(run), config, cluster, requests(config, "cpu"), watching, guard, only, "ada-1")
        controller.run()
        return controller, cluster, told

    return go


def phases(controller):
    return [state.phase for state in controller.states]


def test_blocks_with_room_run_side_by_side_to_their_end(bring):
    controller, cluster, told = bring({})
    assert phases(controller) == [Phase.DONE] * 3 and cluster.most == 3
    assert [state.committed for state in controller.states] == [STEPS] * 3
    assert [cluster.attempts(b) for b in range(3)] == [[1]] * 3
    assert len({a.token for a in cluster.started}) == 3 and len({a.session for a in cluster.started}) == 1
    assert "block 1: done at step 4" in told


def test_a_block_that_is_shorter_than_the_others_is_done_at_its_own_last_step(bring):
    controller, cluster, told = bring({1: [crash_after(2)]}, "training.blocks.1.steps=2")
    assert phases(controller) == [Phase.DONE] * 3 and cluster.attempts(1) == [1]
    assert [state.committed for state in controller.states] == [STEPS, 2, STEPS]
    assert "block 1: done at step 2" in told


def test_blocks_that_are_not_asked_for_are_left_to_other_places_and_nothing_of_them_is_written(bring):
    controller, cluster, told = bring({}, only=[0, 2])
    assert phases(controller) == [Phase.DONE, Phase.ELSEWHERE, Phase.DONE]
    assert [a.block for a in cluster.started] == [0, 2] and {a.place for a in cluster.started} == {"ada-1"}
    assert controller.run_store.child("blocks").list() == ["00", "02"]
    assert not any("block 1" in line for line in told)
    again, _, _ = bring({}, only=[1, 2])
    assert phases(again) == [Phase.DONE] * 3


def test_a_block_that_is_not_asked_for_and_fits_nowhere_here_is_no_obstacle(bring):
    controller, _, _ = bring({}, "cluster.blocks.2.cpus_per_worker=16", only=[0])
    assert phases(controller) == [Phase.DONE, Phase.ELSEWHERE, Phase.ELSEWHERE]


def test_blocks_that_train_in_turn_wait_in_vain_for_one_that_is_elsewhere(bring):
    controller, _, _ = bring({}, "method=greedy", "noise.ranges=uniform", only=[1])
    assert phases(controller) == [Phase.ELSEWHERE, Phase.STOPPED, Phase.ELSEWHERE]
    assert controller.states[1].error == "it needs block 0, which is elsewhere"


@pytest.mark.parametrize(("cpus", "most"), [(1, 1), (2, 2)])
def test_blocks_queue_when_there_is_room_for_fewer(bring, cpus, most):
    controller, cluster, _ = bring({}, cpus=cpus)
    assert phases(controller) == [Phase.DONE] * 3
    assert cluster.most == most and [a.block for a in cluster.started] == [0, 1, 2]


def test_a_run_that_can_never_be_placed_is_refused_before_anything_starts(bring):
    with pytest.raises(PlacementError, match="block 2 wants 1 worker"):
        bring({}, "cluster.blocks.2.cpus_per_worker=16")


def test_a_crashed_block_comes_back_under_the_next_number_and_hurts_no_other(bring):
    controller, cluster, told = bring({1: [crash, crash_after(2), finish]})
    assert phases(controller) == [Phase.DONE] * 3
    assert [cluster.attempts(b) for b in range(3)] == [[1], [1, 2, 3], [1]]
    state = controller.states[1]
    assert (state.restarts, state.preemptions, state.error) == (2, 0, None)
    tokens = [a.token for a in cluster.started if a.block == 1]
    assert len(set(tokens)) == 3
    assert any("block 1: crashed, committed step 2; comes back" in line and "CUDA error" in line for line in told)


def test_all_that_the_cluster_says_of_a_death_is_kept_and_little_is_shown(bring):
    prose = "ActorDiedError: its ip is 10.0.0.7. Worker unexpectedly exits with a connection error code 2. End of file."

    def killed(attempt):
        attempt.train(1)
        attempt.error = prose

    controller, _, told = bring({1: [killed]}, "cluster.max_crashes=0")
    assert controller.states[1].error == status(Run(controller.run_store))[1].error == KILLED
    assert "10.0.0.7" not in "".join(told) and any(f"FAILED ({KILLED})" in line for line in told)
    attempt = controller.records.blocks[1].attempt(1)
    placed, kept = EventTail(attempt, COORDINATOR).read()
    assert placed["event"] == "placed" and (kept["event"], kept["error"]) == ("died", prose)
    assert prose not in attempt.read_text("events.jsonl")  # which is the worker's own


def test_a_replaced_attempt_can_commit_no_more(bring):
    cut_off = []

    def cut(attempt):
        cut_off.append(attempt)
        crash(attempt)

    bring({0: [cut, finish]})
    with pytest.raises(FencedError, match="attempt 2"):
        cut_off[0].commit(3)


def test_a_block_whose_crashes_make_no_progress_fails_and_the_others_finish(bring):
    controller, cluster, _ = bring({1: [crash]}, "cluster.max_crashes=2")
    assert phases(controller) == [Phase.DONE, Phase.FAILED, Phase.DONE]
    assert cluster.attempts(1) == [1, 2, 3]
    assert "CUDA error" in controller.states[1].error


def test_crashes_that_make_progress_do_not_spend_the_budget(bring):
    controller, cluster, _ = bring(
        {1: [crash_after(1), crash_after(2), crash_after(3), finish]}, "cluster.max_crashes=1"
    )
    assert phases(controller) == [Phase.DONE] * 3 and cluster.attempts(1) == [1, 2, 3, 4]


def test_an_error_that_another_attempt_would_meet_again_is_not_tried_again(bring):
    controller, cluster, told = bring({0: [fail]}, cpus=1)
    assert phases(controller) == [Phase.FAILED, Phase.DONE, Phase.DONE]
    assert cluster.attempts(0) == [1] and "loss of step 1 is nan" in controller.states[0].error
    assert any("block 0: failed" in line and "FAILED" in line for line in told)


def test_a_storage_error_is_tried_again(bring):
    def storage(attempt):
        attempt.end("failed", error="disk full", retry=True)

    controller, cluster, _ = bring({2: [storage, finish]})
    assert phases(controller) == [Phase.DONE] * 3 and cluster.attempts(2) == [1, 2]
    assert controller.states[2].crashes == 1


@pytest.mark.parametrize("part", [preempt, lose_node])
def test_preemptions_are_counted_apart_from_crashes(bring, part):
    controller, cluster, _ = bring({1: [part, part, part, finish]}, "cluster.max_crashes=0")
    assert phases(controller) == [Phase.DONE] * 3 and cluster.attempts(1) == [1, 2, 3, 4]
    assert (controller.states[1].preemptions, controller.states[1].crashes) == (3, 0)


def test_more_preemptions_than_the_budget_fail_the_block(bring):
    controller, cluster, _ = bring({1: [preempt]}, "cluster.max_preemptions=2")
    assert phases(controller) == [Phase.DONE, Phase.FAILED, Phase.DONE] and cluster.attempts(1) == [1, 2, 3]


def test_a_stop_lets_workers_commit_and_starts_nothing_more(bring):
    def stop_when_running(controller):
        if controller.states[0].phase is Phase.RUNNING and not controller.stopping:
            controller.stop("SIGTERM")

    controller, cluster, _ = bring({0: [wait], 1: [wait]}, cpus=2, act=stop_when_running)
    assert phases(controller) == [Phase.STOPPED] * 3
    assert [state.committed for state in controller.states] == [2, 2, 0]
    assert [a.block for a in cluster.started] == [0, 1]
    assert controller.states[0].error == "SIGTERM" and "before it started" in controller.states[2].error


def test_a_stop_that_the_storage_does_not_take_is_asked_for_again(bring, monkeypatch):
    left, write = [3], Store.write_json

    def away(self, name, value):
        if name == conduct.STOP and left[0]:
            left[0] -= 1
            raise ShardError("cannot write STOP.json")
        return write(self, name, value)

    def stop_when_running(controller):
        if controller.states[0].phase is Phase.RUNNING and not controller.stopping:
            controller.stop("SIGTERM")

    monkeypatch.setattr(Store, "write_json", away)
    controller, _, told = bring({0: [wait], 1: [wait]}, cpus=2, act=stop_when_running)
    assert phases(controller) == [Phase.STOPPED] * 3 and controller.states[0].committed == 2
    assert sum("cannot be asked to stop" in line for line in told) == 1


def test_a_stop_does_not_wait_for_what_ray_holds_back(bring, monkeypatch):
    monkeypatch.setattr(conduct, "STOP_GRACE_S", 0.05)
    monkeypatch.setattr(Cluster, "silent", (1,))

    def stop_when_running(controller):
        if 1 in controller.running and controller.states[0].phase is Phase.RUNNING and not controller.stopping:
            controller.stop("SIGINT")

    controller, cluster, _ = bring({0: [wait], 1: [wait]}, cpus=2, act=stop_when_running)
    assert phases(controller) == [Phase.STOPPED] * 3 and [a.block for a in cluster.started] == [0, 1]
    assert [state.committed for state in controller.states] == [2, 0, 0]
    assert controller.states[1].error == "stopped before its workers started"


def test_a_block_that_fits_on_no_node_that_is_left_says_so_once_and_again_when_that_changes(bring):
    seen = iter(range(60))

    def change(controller):
        looks = next(seen, 60)
        size = 1 if looks < 20 else 2 if looks < 40 else 8
        if controller.states[1].attempt:
            controller.cluster.machines = [Node("a", {"CPU": size})]

    overrides = ["cluster.blocks.1.cpus_per_worker=4"]
    controller, _, told = bring({1: [lose_node, finish]}, *overrides, act=change)
    assert phases(controller) == [Phase.DONE] * 3
    waits = [line for line in told if line.startswith("block 1: waits for nodes")]
    assert len(waits) == 2 and "a has 1 CPU" in waits[0] and "a has 2 CPU" in waits[1]


def test_a_block_that_crashes_during_a_stop_is_not_started_again(bring):
    def stop_at_once(controller):
        if controller.running and not controller.stopping:
            controller.stop("SIGINT")

    controller, cluster, _ = bring({0: [crash], 1: [wait], 2: [wait]}, act=stop_at_once)
    assert phases(controller) == [Phase.STOPPED] * 3 and cluster.attempts(0) == [1]


def test_a_command_killed_before_its_workers_spoke_is_continued(bring, monkeypatch):
    """A block is owned for seconds before its worker starts, by an attempt that then never comes."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cluster, "start", killed)
        bring({})
    controller, cluster, _ = bring({})
    assert phases(controller) == [Phase.DONE] * 3
    # all three were claimed before the first was started, and a number is spent with its claim
    assert [cluster.attempts(block) for block in range(3)] == [[2], [2], [2]]


def test_the_same_command_continues_only_what_is_missing(bring):
    first, _, _ = bring({1: [fail]})
    assert phases(first) == [Phase.DONE, Phase.FAILED, Phase.DONE]
    second, cluster, _ = bring({})
    assert phases(second) == [Phase.DONE] * 3
    assert [(a.block, a.attempt) for a in cluster.started] == [(1, 2)]
    third, cluster, _ = bring({})
    assert phases(third) == [Phase.DONE] * 3 and not cluster.started


def test_a_block_that_is_done_needs_no_place(bring):
    overrides = "cluster.blocks.0.cpus_per_worker=8"
    bring({1: [fail]}, overrides)
    again, cluster, _ = bring({}, overrides, cpus=4)
    assert phases(again) == [Phase.DONE] * 3 and [a.block for a in cluster.started] == [1]


def test_a_block_whose_last_commit_is_damaged_is_trained_again(bring):
    controller, _, _ = bring({})
    shard = controller.records.blocks[2].store.path / "step_00000004" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    again, cluster, _ = bring({})
    assert [(a.block, a.attempt) for a in cluster.started] == [(2, 2)] and phases(again) == [Phase.DONE] * 3


@pytest.mark.parametrize(
    ("repair", "phase", "error"),
    [
        (crash, Phase.FAILED, "CUDA error"),
        (fail, Phase.FAILED, "loss of step 1"),
        (wait, Phase.STOPPED, "SIGTERM"),
    ],
)
def test_a_block_whose_damaged_last_commit_is_not_repaired_is_not_done(bring, repair, phase, error):
    controller, _, _ = bring({2: [crash_after(2), finish]})
    shard = controller.records.blocks[2].store.path / "step_00000004" / "model.safetensors"
    shard.write_bytes(bytes([*shard.read_bytes()[:-1], shard.read_bytes()[-1] ^ 1]))

    def stop_when_running(controller):
        if controller.states[2].phase is Phase.RUNNING and not controller.stopping:
            controller.stop("SIGTERM")

    act = stop_when_running if repair is wait else lambda controller: None
    again, cluster, _ = bring({2: [repair]}, act=act)
    assert cluster.attempts(2)[0] == 3 and again.states[2].phase is phase
    assert error in again.states[2].error and again.states[2].committed == 2


def test_an_outage_of_the_storage_ends_no_attempt(bring, monkeypatch):
    read, outage = EventTail.read, iter(range(40))

    def sometimes(tail):
        if next(outage, None) is not None:
            raise ShardError("the storage does not answer")
        return read(tail)

    monkeypatch.setattr(EventTail, "read", sometimes)
    controller, cluster, told = bring({})
    assert phases(controller) == [Phase.DONE] * 3
    assert [cluster.attempts(b) for b in range(3)] == [[1]] * 3
    assert len([line for line in told if "cannot be read, tried again" in line]) == 3


def test_a_storage_that_never_answers_again_ends_the_command(bring, monkeypatch):
    def never(tail):
        raise ShardError("the storage does not answer")

    monkeypatch.setattr(EventTail, "read", never)
    with pytest.raises(ShardError, match="does not answer"):
        bring({}, "cluster.hang_timeout_s=0.05")


def test_a_disk_too_full_to_own_a_block_is_a_crash_of_that_block(bring, monkeypatch):
    claim, full = records.claim, iter(range(2))

    def refuse(store, attempt, token):
        if store.url.endswith("01") and next(full, None) is not None:
            raise ShardError("the disk is full")
        claim(store, attempt, token)

    monkeypatch.setattr(records, "claim", refuse)
    controller, cluster, told = bring({})
    assert phases(controller) == [Phase.DONE] * 3
    # a number is not used again: what claimed the block may have been written all the same
    assert cluster.attempts(1) == [3] and controller.states[1].restarts == 2
    assert any("block 1: crashed" in line and "disk is full" in line for line in told)


def test_a_claim_that_landed_though_the_storage_said_nothing_is_followed_by_another(bring, monkeypatch):
    claim, cut = records.claim, iter(range(1))

    def lose_reply(store, attempt, token):
        claim(store, attempt, token)
        if store.url.endswith("01") and next(cut, None) is not None:
            raise ShardError("the storage does not answer")

    monkeypatch.setattr(records, "claim", lose_reply)
    controller, cluster, _ = bring({})
    assert phases(controller) == [Phase.DONE] * 3
    assert [cluster.attempts(block) for block in range(3)] == [[1], [2], [1]]


def test_a_coordinator_that_lost_its_run_stops(bring):
    looks = iter(range(5))

    def guard():
        if next(looks, None) is None:
            raise RunLockedError("taken over by another coordinator")

    with pytest.raises(RunLockedError, match="taken over"):
        bring({0: [wait]}, guard=guard)


def of_two(first, second, error="RuntimeError: connection closed by peer"):
    """An attempt of two ranks that end so; None for one that says nothing."""

    def part(attempt):
        logs = [attempt.log, EventLog(attempt.log.store, 1)]
        for rank, fields in enumerate((first, second)):
            if fields:
                logs[rank].clock = lambda at=fields["at"]: at
                logs[rank].emit("end", **fields, **({"rank": rank} if rank else {}))
        attempt.error = error

    return part


CLOSED = {"outcome": "crashed", "error": "connection closed"}
NAN = {"outcome": "failed", "error": "the data of rank 1", "retry": False}
MEMORY = {"outcome": "crashed", "error": "out of memory"}


@pytest.mark.parametrize(
    ("ends", "phase", "error"),
    [
        ((None, {**NAN, "at": 1}), Phase.FAILED, "the data of rank 1"),
        (({**CLOSED, "at": 2}, {**NAN, "at": 1}), Phase.FAILED, "the data of rank 1"),
        (({**CLOSED, "at": 1}, {**NAN, "at": 2}), Phase.FAILED, "the data of rank 1"),
        (({**CLOSED, "at": 2}, {**MEMORY, "at": 1}), Phase.FAILED, "out of memory"),
        (({**MEMORY, "at": 1}, {**CLOSED, "at": 2}), Phase.FAILED, "out of memory"),
        ((None, {**CLOSED, "at": 1}), Phase.FAILED, "RuntimeError: connection closed by peer"),
        (({"outcome": "stopped", "reason": "SIGTERM", "at": 1}, {**NAN, "at": 2}), Phase.FAILED, "SIGTERM"),
    ],
)
def test_an_error_of_any_rank_reaches_the_user(bring, ends, phase, error):
    overrides = ["cluster.blocks.1.workers=2", "cluster.max_crashes=0", "cluster.max_preemptions=0"]
    controller, cluster, _ = bring({1: [of_two(*ends)]}, *overrides)
    assert cluster.attempts(1) == [1]
    assert (controller.states[1].phase, controller.states[1].error) == (phase, error)


def test_progress_follows_the_events(bring):
    controller, _, _ = bring({1: [crash_after(2), finish]})
    progress = controller.progress[1]
    assert (progress.step, progress.loss, progress.rate, progress.memory) == (4, 0.25, 2.0, 2**20)
    assert progress.seconds == pytest.approx(3.0)  # two steps, then four, of half a second


def test_status_reads_the_same_from_the_files_alone(bring):
    controller, _, _ = bring({0: [crash_after(2), finish], 1: [fail]})
    zero, one, two = status(Run(controller.run_store))
    assert [block.row.phase for block in (zero, one, two)] == ["done", "failed", "done"]
    assert [block.committed for block in (zero, one, two)] == [4, 0, 4]
    assert (zero.attempts, zero.row.restarts, zero.error) == (2, 1, None)
    assert "loss of step 1" in one.error and one.since >= 0
    assert (two.row.layers, two.row.levels) == ((4, 6), pytest.approx((0.1, 10 ** (-1 / 3))))


def test_an_attempt_counts_from_its_placement_though_its_worker_never_spoke(bring):
    seen = set()

    def look(controller):
        run = controller.run_store
        live = row(Run(run), Run(run).plan, controller.states[1], controller.progress[1])
        if live.phase == "placed":
            seen.add((live.restarts, status(Run(run))[1].row.restarts, status(Run(run))[1].attempts))

    controller, cluster, _ = bring({1: [die_in_the_start]}, "cluster.max_crashes=2", act=look)
    assert cluster.attempts(1) == [1, 2, 3]
    assert not any(EventTail(controller.records.blocks[1].attempt(a)).read() for a in (1, 2, 3))
    assert seen == {(0, 0, 1), (1, 1, 2), (2, 2, 3)}
    block = status(Run(controller.run_store))[1]
    assert (block.attempts, block.row.phase) == (3, "failed")


def test_status_tells_that_a_killed_command_left_its_blocks_behind(bring):
    def kill_when_running(controller):
        if controller.states[1].phase is Phase.RUNNING:
            raise KeyboardInterrupt

    conductors = []
    with pytest.raises(KeyboardInterrupt):
        bring({0: [crash, wait], 1: [wait], 2: [wait]}, act=lambda c: conductors.append(c) or kill_when_running(c))
    run = conductors[0].run_store
    with RunLock(run, "dbtrain train toy"):
        assert status(Run(run))[1].row.phase == "running" and status(Run(run))[1].error is None
    for block in status(Run(run)):
        assert (block.row.phase, block.since) == ("lost", None) and "no command runs, it was" in block.error


def test_status_of_a_run_that_was_never_started_is_pending(make_run):
    _, run = make_run()
    assert [(block.row.phase, block.error) for block in status(Run(run))] == [("pending", None)] * 3


def test_greedy_blocks_start_one_after_another(bring):
    controller, cluster, _ = bring({1: [crash, finish]}, "method=greedy")
    assert [a.block for a in cluster.started] == [0, 1, 1, 2] and cluster.most == 1
    assert all(state.phase is Phase.DONE for state in controller.states)


def test_a_greedy_block_that_fails_stops_those_that_need_it(bring):
    controller, cluster, _ = bring({1: [fail]}, "method=greedy")
    assert [state.phase for state in controller.states] == [Phase.DONE, Phase.FAILED, Phase.STOPPED]
    assert "needs block 1, which is failed" in controller.states[2].error
    assert [a.block for a in cluster.started] == [0, 1]
