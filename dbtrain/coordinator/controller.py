"""Bring every block to its end: start what fits, watch what runs, and start again what died."""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dbtrain.config import Config
from dbtrain.coordinator.block_records import BlockRecords, Claim
from dbtrain.coordinator.exit_reasons import classify
from dbtrain.coordinator.interface import Attempt, Cluster
from dbtrain.coordinator.lifecycle import FINAL, BlockState, Budgets, Exit, Phase, ended, placed, running
from dbtrain.coordinator.placement import Room, obstacles, place
from dbtrain.coordinator.progress import Progress
from dbtrain.errors import ShardError
from dbtrain.method.schemes import SCHEMES
from dbtrain.run.requests import Request
from dbtrain.run.run import Run
from dbtrain.telemetry.events import EventTail, last_words
from dbtrain.training.assignment import Assignment
from dbtrain.training.watchdog import STOP

POLL_S = 0.25
READ_AT_A_POLL = 100
"""Blocks whose events are read at one poll. Where more run they take turns, so that a poll stays short and
deaths, which need no file to be seen, are told at once; what one of 1,000 blocks says is read in 2.5 s."""
STOP_GRACE_S = 5.0
"""How long the workers of an attempt that was just placed have to say that they have started,
once they are asked to stop."""


class Observer(Protocol):
    """Who watches a run: the live view and the trackers of a command."""

    def show(self, states: list[BlockState], progress: list[Progress]) -> None:
        """Called at every poll with all blocks."""

    def tell(self, line: str) -> None:
        """Called with one line for each thing that happens."""

    def event(self, block: int, event: dict[str, Any]) -> None:
        """Called with each new event of a block's workers."""


@dataclass
class RunningAttempt:
    """An attempt and where its events come from."""

    attempt: Attempt
    tail: EventTail
    started: bool = False
    """Whether a worker has said so; Ray may hold an attempt back while others use its resources."""
    silent_since: float | None = None
    """Monotonic time since which the storage has not given its events."""


class Controller:
    """Run the blocks of a prepared run.

    Args:
        run: the run; the caller holds its lock.
        config: configuration of this start of the run.
        cluster: where attempts are started.
        wanted: what each block asks for.
        observer: is told what happens.
        guard: called at every poll; raises once this coordinator has lost the run to another, or its cluster
            has ended.
        only: blocks that are trained; all for None. Of the others nothing is started, and nothing written.
        place: name of this copy of the run, which the commits carry.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        cluster: Cluster,
        wanted: Sequence[Request],
        observer: Observer,
        guard: Callable[[], None] = lambda: None,
        only: Collection[int] | None = None,
        place: str = "",
    ) -> None:
        self.run_store = run.store
        self.config = config
        self.cluster = cluster
        self.wanted = list(wanted)
        self.observer, self.guard = observer, guard
        self.session = secrets.token_hex(8)
        self.stopping = False
        self.in_turn = SCHEMES[config.method].in_turn
        limits = config.cluster
        self.budgets = Budgets(limits.max_crashes, limits.max_preemptions, limits.backoff_s)
        self.records = BlockRecords(run)
        self.place = place
        self.states = [self.records.first_state(block, only is None or block in only) for block in range(len(wanted))]
        self.progress = [Progress(step=state.committed) for state in self.states]
        self.running: dict[int, RunningAttempt] = {}
        self._stop_asked = 0.0
        self._stop_unsent: dict[str, Any] | None = None
        self._stop_failure_told = False
        self._obstacles: dict[int, str | None] = {}

    def run(self) -> list[BlockState]:
        """Train until every block is done, stopped or failed; returns the last states.

        Raises:
            PlacementError: a block that is not done fits on no node.
            RunLockedError: from ``guard``.
            ShardError: the storage stayed away for as long as a worker may hang.
        """
        place([self.wanted[s.block] for s in self.states if s.phase not in FINAL], self.cluster.nodes())
        for state in self.states:
            self._set_state(state)
        self._write_states()
        while any(state.phase not in FINAL for state in self.states):
            self.guard()
            try:
                self._send_stop_request()
                self._end_what_will_never_start()
                self._start_what_fits()
                self._poll_those_due()
            finally:
                self._write_states()
            self.observer.show(self.states, self.progress)
            time.sleep(POLL_S)
        self.observer.show(self.states, self.progress)
        return self.states

    def stop(self, reason: str) -> None:
        """Ask all workers to commit and leave, at the next poll; nothing is started any more.

        Called by a signal, in the middle of anything: it writes nothing itself, since a storage that
        fails just then would raise there, or be taken for the failure of whatever was under way.
        """
        self.stopping, self._stop_asked = True, time.monotonic()
        self._stop_unsent = {"session": self.session, "reason": reason, "pid": os.getpid()}

    def _send_stop_request(self) -> None:
        if self._stop_unsent is None:
            return
        try:
            self.run_store.write_json(STOP, self._stop_unsent)
        except ShardError as error:
            if not self._stop_failure_told:
                self._stop_failure_told = True
                self.observer.tell(f"the workers cannot be asked to stop ({error}); it is tried until they can")
            return
        self._stop_unsent, self._stop_asked = None, time.monotonic()

    def _end_what_will_never_start(self) -> None:
        """Blocks that wait while the command stops, or for a
        block before them that ended without being done."""
        why = "stopped before it started" if self.stopping else self._why_those_after_wait_in_vain()
        for state in self.states if why else ():
            if state.phase is Phase.PENDING:
                self._set_state(dataclasses.replace(state, phase=Phase.STOPPED, error=why))

    def _why_those_after_wait_in_vain(self) -> str | None:
        first = self._first_not_done() if self.in_turn else None
        return f"it needs block {first.block}, which is {first.phase.value}" if first and first.phase in FINAL else None

    def _first_not_done(self) -> BlockState | None:
        return next((state for state in self.states if state.phase is not Phase.DONE), None)

    def _ready(self) -> list[int]:
        """Blocks that may start now: whose pause is over and,
        where blocks train in turn, whose turn it is."""
        now = time.monotonic()
        ready = [s.block for s in self.states if s.phase is Phase.PENDING and s.not_before <= now]
        if not self.in_turn:
            return ready
        first = self._first_not_done()
        return [block for block in ready if first is not None and block == first.block]

    def _start_what_fits(self) -> None:
        ready = self._ready()
        if not ready:
            return
        nodes = self.cluster.nodes()
        # first those that run, so that only what they leave is given away
        room = Room(nodes, [self.wanted[block] for block in self.running])
        self._start([block for block in ready if room.take(self.wanted[block]) is not None])
        for block, why in zip(ready, obstacles([self.wanted[block] for block in ready], nodes), strict=True):
            self._tell_obstacle(block, why)

    def _tell_obstacle(self, block: int, why: str | None) -> None:
        """Say once why a block fits on no node that is left,
        and again when that changes: it may wait for ever."""
        if why is not None and why != self._obstacles.get(block):
            self.observer.tell(f"{self._name(block)}: waits for nodes: {why}")
        self._obstacles[block] = why

    def _start(self, blocks: Sequence[int]) -> None:
        states = [placed(self.states[block]) for block in blocks]
        claims = [Claim(state.block, state.attempt, secrets.token_hex(8)) for state in states]
        for state, claim, tail in zip(states, claims, self.records.claim(claims), strict=True):
            if isinstance(tail, ShardError):
                # full or out of reach: as if the worker had met it. Its number is spent,
                # because the claim may have landed.
                self.states[state.block] = state
                self._apply(state.block, Exit("crashed", str(tail), state.committed))
            else:
                self._start_claimed(state, claim.token, tail)

    def _start_claimed(self, state: BlockState, token: str, tail: EventTail) -> None:
        block = state.block
        name = f"{self.config.name}-block{block}-attempt{state.attempt}-{self.session[:6]}"
        self.progress[block].end = self.progress[block].warned = None
        attempt = self.cluster.start(self._assignment(block, state.attempt, token), self.wanted[block], name)
        self.running[block] = RunningAttempt(attempt, tail)
        self._set_state(state)
        self.observer.tell(f"{self._name(block)}: attempt {state.attempt} placed")

    def _assignment(self, block: int, attempt: int, token: str) -> Assignment:
        request = self.wanted[block]
        return Assignment(
            run_url=self.run_store.url,
            block=block,
            attempt=attempt,
            token=token,
            session=self.session,
            workers=request.workers,
            micro_batch=request.micro_batch,
            device="cuda" if request.device == "cuda" else "cpu",
            threads=max(1, int(request.resources["CPU"])),
            hang_timeout_s=self.config.cluster.hang_timeout_s,
            place=self.place,
            config=self.config.for_workers().model_dump(mode="json"),
        )

    def _poll_those_due(self) -> None:
        """Those whose attempt is over, and of the others those whose turn it is to be read."""
        # asked before reading, so that the last events are not missed
        over = {block: running.attempt.over for block, running in self.running.items()}
        blocks = list(self.running)
        due = blocks[:READ_AT_A_POLL]
        for block in [*(block for block in blocks[READ_AT_A_POLL:] if over[block]), *due]:
            self._poll(block, over[block])
        for block in due if len(blocks) > READ_AT_A_POLL else ():
            if block in self.running:  # to the end of the queue
                self.running[block] = self.running.pop(block)

    def _poll(self, block: int, over: bool) -> None:
        """Read what the workers of a block have said, and conclude its attempt when it is over."""
        attempt = self.running[block]
        try:
            for event in attempt.tail.read():
                self._handle(block, event)
            for event in last_words(attempt.tail.store, self.wanted[block].workers) if over else ():
                self._handle(block, event)
            committed = self.records.blocks[block].committed if over else 0
        except ShardError as error:
            self._wait_for_storage(block, attempt, error)
            return
        attempt.silent_since = None
        if over:
            del self.running[block]
            self._conclude(block, attempt.attempt.error, committed)
        elif self.stopping and not attempt.started and time.monotonic() - self._stop_asked > STOP_GRACE_S:
            # nobody is there to read the request; what Ray may
            # still start ends when the command leaves the cluster
            del self.running[block]
            state, why = self.states[block], "stopped before its workers started"
            self.records.tell(block, state.attempt, "end", outcome="stopped", reason=why)
            self._apply(block, Exit("stopped", why, state.committed))

    def _handle(self, block: int, event: dict[str, Any]) -> None:
        self.progress[block].take(event)
        if event["event"] == "start":
            self.running[block].started = True
        self.observer.event(block, event)
        if event["event"] == "ready":
            self._set_state(running(self.states[block]))
            self.observer.tell(f"{self._name(block)}: training from step {event['step']}")
        if event["event"] in ("skipped", "note"):
            self.observer.tell(f"{self._name(block)}: {event['reason']}")

    def _wait_for_storage(self, block: int, attempt: RunningAttempt, error: ShardError) -> None:
        """An outage of the storage is no reason to end workers that train on; one without an end is told."""
        now = time.monotonic()
        if attempt.silent_since is None:
            attempt.silent_since = now
            self.observer.tell(f"{self._name(block)}: its events cannot be read, tried again ({error})")
        if now - attempt.silent_since > self.config.cluster.hang_timeout_s:
            raise error

    def _conclude(self, block: int, error: str | None, committed: int) -> None:
        """Find out how an attempt ended."""
        self._set_state(dataclasses.replace(self.states[block], phase=Phase.LOST))
        if error is not None:
            self.records.tell(block, self.states[block].attempt, "died", error=error)
        steps = self.records.blocks[block].steps
        self._apply(block, classify(self.progress[block], error, committed, steps, self.stopping))

    def _apply(self, block: int, exit_: Exit) -> None:
        """Make a block's next state of how its attempt ended."""
        state = ended(self.states[block], exit_, self.budgets, time.monotonic())
        self._set_state(state)
        if state.phase is Phase.DONE:
            self.observer.tell(f"{self._name(block)}: done at step {exit_.step}")
        else:
            verdict = {Phase.PENDING: "comes back", Phase.STOPPED: "stopped", Phase.FAILED: "FAILED"}[state.phase]
            line = f"{exit_.kind}, committed step {exit_.step}; {verdict} ({state.error})"
            self.observer.tell(f"{self._name(block)}: {line}")

    def _name(self, block: int) -> str:
        return self.records.blocks[block].name

    def _set_state(self, state: BlockState) -> None:
        self.states[state.block] = state
        if state.phase is not Phase.ELSEWHERE:
            self.records.note(state)

    def _write_states(self) -> None:
        """Once a poll, however many states a block went through in it."""
        for block, error in self.records.write().items():
            # for `status` only; the commits are the truth
            self.observer.tell(f"{self._name(block)}: its state could not be written ({error})")
