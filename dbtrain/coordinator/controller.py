"""Bring every block to its end: admit, watch, restart, and tell."""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dbtrain.config import Config
from dbtrain.coordinator.block_records import BlockRecords
from dbtrain.coordinator.exit_reasons import classify
from dbtrain.coordinator.interface import Attempt, Cluster
from dbtrain.coordinator.lifecycle import FINAL, BlockState, Budgets, Exit, Phase, ended, placed, running
from dbtrain.coordinator.placement import Node, fits, obstacle, place
from dbtrain.coordinator.progress import Progress
from dbtrain.errors import ShardError
from dbtrain.method.schemes import SCHEMES
from dbtrain.run.requests import Request
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.events import EventTail, last_words
from dbtrain.training.assignment import Assignment
from dbtrain.training.watchdog import STOP

POLL_S = 0.25
STOP_GRACE_S = 5.0
"""For the workers of an attempt that was just placed to say that they have started, once they are asked to stop."""


@dataclass
class Running:
    """An attempt and where its events come from."""

    attempt: Attempt
    tail: EventTail
    started: bool = False
    """Whether a worker has said so; Ray may hold an attempt back while others use its resources."""
    silent_since: float | None = None
    """Monotonic time since which the storage has not given its events."""


class Controller:
    """Run the blocks of a settled run.

    Args:
        run: directory of the run; the caller holds its lock.
        config: of the run.
        cluster: where attempts are started.
        wanted: what each block asks for.
        show: called often with all states and progress.
        tell: called with one line for each thing that happens.
        on_event: called with each new event of a block.
        guard: called all the time; raises once this coordinator has lost the run to another.
    """

    def __init__(
        self,
        run: Store,
        config: Config,
        cluster: Cluster,
        wanted: Sequence[Request],
        show: Callable[[list[BlockState], list[Progress]], None],
        tell: Callable[[str], None],
        on_event: Callable[[int, dict[str, Any]], None] = lambda block, event: None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_store = run
        self.config = config
        self.cluster = cluster
        self.wanted = list(wanted)
        self.show, self.tell, self.on_event, self.guard = show, tell, on_event, guard
        self.session = secrets.token_hex(8)
        self.stopping = False
        self.in_turn = SCHEMES[config.method].in_turn
        cluster_config = config.cluster
        self.budgets = Budgets(cluster_config.max_crashes, cluster_config.max_preemptions, cluster_config.backoff_s)
        self.records = BlockRecords(run, len(wanted))
        self.states = [self.records.first_state(block, config.training.steps) for block in range(len(wanted))]
        self.progress = [Progress(step=state.committed) for state in self.states]
        self.running: dict[int, Running] = {}
        self._stop_asked = 0.0
        self._stop_unsent: dict[str, Any] | None = None
        self._stop_told = False
        self._obstacles: dict[int, str | None] = {}

    def conduct(self) -> list[BlockState]:
        """Until every block is done, stopped or failed; returns the last states.

        Raises:
            PlacementError: a block that is not done fits on no node.
            RunLockedError: from ``guard``.
            ShardError: the storage stayed away for as long as a worker may hang.
        """
        place([self.wanted[s.block] for s in self.states if s.phase not in FINAL], self.cluster.nodes())
        for state in self.states:
            self._record(state)
        while any(state.phase not in FINAL for state in self.states):
            self.guard()
            self._ask_to_stop()
            self._admit()
            for block in list(self.running):
                self._follow(block)
            self.show(self.states, self.progress)
            time.sleep(POLL_S)
        self.show(self.states, self.progress)
        return self.states

    def stop(self, reason: str) -> None:
        """Ask all workers to commit and leave, at the next poll; nothing is started any more.

        Called by a signal, in the middle of anything: it writes nothing itself, since a storage that fails just then
        would raise there, or be taken for the failure of whatever was under way.
        """
        self.stopping, self._stop_asked = True, time.monotonic()
        self._stop_unsent = {"session": self.session, "reason": reason, "pid": os.getpid()}

    def _ask_to_stop(self) -> None:
        if self._stop_unsent is None:
            return
        try:
            self.run_store.write_json(STOP, self._stop_unsent)
        except ShardError as error:
            if not self._stop_told:
                self._stop_told = True
                self.tell(f"the workers cannot be asked to stop ({error}); it is tried until they can")
            return
        self._stop_unsent, self._stop_asked = None, time.monotonic()

    def _admit(self) -> None:
        now = time.monotonic()
        busy = [self.wanted[block] for block in self.running]
        ready = [s.block for s in self.states if s.phase is Phase.PENDING and s.not_before <= now]
        if self.in_turn:
            ready = self._next_in_turn(ready)
        if self.stopping:
            for state in self.states:
                if state.phase is Phase.PENDING:
                    self._record(dataclasses.replace(state, phase=Phase.STOPPED, error="stopped before it started"))
            return
        if not ready:
            return
        nodes = self.cluster.nodes()
        for block in ready:
            # first those that run, so that only what they leave is given away
            if fits(self.wanted[block], busy, nodes):
                self._start(block)
                busy.append(self.wanted[block])
            self._tell_obstacle(block, nodes)

    def _tell_obstacle(self, block: int, nodes: list[Node]) -> None:
        """Say once why a block fits on no node that is left, and again when that changes: it may wait for ever."""
        why = obstacle(self.wanted[block], nodes)
        if why is not None and why != self._obstacles.get(block):
            self.tell(f"block {block}: waits for nodes: {why}")
        self._obstacles[block] = why

    def _next_in_turn(self, ready: list[int]) -> list[int]:
        """The first block that is not done, if it is ready; those after one that failed will never start."""
        first = next((s for s in self.states if s.phase is not Phase.DONE), None)
        if first is not None and first.phase in FINAL:
            for state in self.states[first.block + 1 :]:
                if state.phase is Phase.PENDING:
                    error = f"it needs block {first.block}, which is {first.phase.value}"
                    self._record(dataclasses.replace(state, phase=Phase.STOPPED, error=error))
            return []
        return [block for block in ready if first is not None and block == first.block]

    def _start(self, block: int) -> None:
        state, request = placed(self.states[block]), self.wanted[block]
        token = secrets.token_hex(8)
        try:
            tail = self.records.claim(block, state.attempt, token)
        except ShardError as error:
            # full or out of reach: as if the worker had met it. Its number is spent, because the claim may have landed.
            self.states[block] = state
            self._leave(block, Exit("crashed", str(error), state.committed))
            return
        assignment = Assignment(
            run_url=self.run_store.url,
            block=block,
            attempt=state.attempt,
            token=token,
            session=self.session,
            workers=request.workers,
            micro_batch=request.micro_batch,
            device="cuda" if request.device == "cuda" else "cpu",
            threads=max(1, int(request.resources["CPU"])),
            hang_timeout_s=self.config.cluster.hang_timeout_s,
            config=self.config.for_workers().model_dump(mode="json"),
        )
        name = f"{self.config.name}-block{block}-attempt{state.attempt}-{self.session[:6]}"
        self.progress[block].end = self.progress[block].warned = None
        self.running[block] = Running(self.cluster.start(assignment, request, name), tail)
        self._record(state)
        self.tell(f"block {block}: attempt {state.attempt} placed")

    def _follow(self, block: int) -> None:
        running_ = self.running[block]
        over = running_.attempt.over  # asked before reading, so that the last events are not missed
        try:
            for event in running_.tail.read():
                self._take(block, event)
            for event in last_words(running_.tail.store, self.wanted[block].workers) if over else ():
                self._take(block, event)
            committed = self.records.committed(block, self.config.training.steps) if over else 0
        except ShardError as error:
            self._wait_for_storage(block, running_, error)
            return
        running_.silent_since = None
        if over:
            del self.running[block]
            self._end(block, running_.attempt.error, committed)
        elif self.stopping and not running_.started and time.monotonic() - self._stop_asked > STOP_GRACE_S:
            # nobody is there to read the request; what Ray may still start ends when the command leaves the cluster
            del self.running[block]
            self._leave(block, Exit("stopped", "stopped before its workers started", self.states[block].committed))

    def _take(self, block: int, event: dict[str, Any]) -> None:
        self.progress[block].take(event)
        if event["event"] == "start":
            self.running[block].started = True
        self.on_event(block, event)
        if event["event"] == "ready":
            self._record(running(self.states[block]))
            self.tell(f"block {block}: training from step {event['step']}")
        if event["event"] == "skipped":
            self.tell(f"block {block}: {event['reason']}")

    def _wait_for_storage(self, block: int, running_: Running, error: ShardError) -> None:
        """An outage of the storage is no reason to end workers that train on; one without an end is told."""
        now = time.monotonic()
        if running_.silent_since is None:
            running_.silent_since = now
            self.tell(f"block {block}: its events cannot be read, tried again ({error})")
        if now - running_.silent_since > self.config.cluster.hang_timeout_s:
            raise error

    def _end(self, block: int, error: str | None, committed: int) -> None:
        self._record(dataclasses.replace(self.states[block], phase=Phase.LOST))
        if error is not None:
            self.records.keep_error(block, self.states[block].attempt, error)
        steps = self.config.training.steps
        self._leave(block, classify(self.progress[block], error, committed, steps, self.stopping))

    def _leave(self, block: int, exit_: Exit) -> None:
        state = ended(self.states[block], exit_, self.budgets, time.monotonic())
        self._record(state)
        if state.phase is Phase.DONE:
            self.tell(f"block {block}: done at step {exit_.step}")
        else:
            verdict = {Phase.PENDING: "comes back", Phase.STOPPED: "stopped", Phase.FAILED: "FAILED"}[state.phase]
            self.tell(f"block {block}: {exit_.kind}, committed step {exit_.step}; {verdict} ({state.error})")

    def _record(self, state: BlockState) -> None:
        self.states[state.block] = state
        try:
            self.records.record(state)
        except ShardError as error:
            # for `status` only; the commits are the truth
            self.tell(f"block {state.block}: its state could not be written ({error})")
