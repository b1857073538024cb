"""Bring every block to its end: admit, watch, restart, and tell."""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dbtrain.config import Config
from dbtrain.coordinator.lifecycle import FINAL, BlockState, Budgets, Exit, Phase, ended, placed, running
from dbtrain.coordinator.placement import Node, Request, place
from dbtrain.errors import PlacementError, ShardError
from dbtrain.method.schemes import SCHEMES
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.fence import claim
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.store import Store
from dbtrain.telemetry.events import EventTail
from dbtrain.training.assignment import Assignment
from dbtrain.training.watchdog import STOP

POLL_S = 0.25


class Attempt(Protocol):
    """A running attempt."""

    @property
    def over(self) -> bool: ...
    @property
    def error(self) -> str | None: ...


class Cluster(Protocol):
    """What the conductor needs of a cluster."""

    def nodes(self) -> list[Node]: ...
    def start(self, assignment: Assignment, request: Request, name: str) -> Attempt: ...


@dataclass
class Progress:
    """What a block's events say of it."""

    step: int = 0
    loss: float | None = None
    rate: float | None = None
    """Steps per second over the last log interval."""
    memory: int | None = None
    seconds: float = 0.0
    """Spent training, over all attempts that this command saw."""
    end: dict[str, Any] | None = None
    warned: str | None = None
    """The signal that told its workers to leave, in this attempt."""
    skipped: list[str] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        """Update by one event."""
        kind = event["event"]
        if kind in ("ready", "resumed", "step"):
            self.step = event["step"]
        if kind in ("resumed", "step"):
            self.loss = event.get("loss")
        if kind == "step":
            self.rate = event["steps"] / event["seconds"] if event["seconds"] else None
            self.memory, self.seconds = event["memory"], self.seconds + event["seconds"]
        if kind == "skipped":
            self.skipped.append(event["reason"])
        if kind in ("start", "stopping"):
            self.warned = event.get("reason")
        if kind == "end":
            self.end = event


@dataclass
class Running:
    """An attempt and where its events come from."""

    attempt: Attempt
    tail: EventTail


class Conductor:
    """Run the blocks of a settled run.

    Args:
        run: directory of the run; the caller holds its lock.
        config: of the run.
        cluster: where attempts are started.
        wanted: what each block asks for.
        show: called often with all states and progress.
        tell: called with one line for each thing that happens.
        on_event: called with each new event of a block.
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
    ) -> None:
        self.run_store = run
        self.config = config
        self.cluster = cluster
        self.wanted = list(wanted)
        self.show, self.tell, self.on_event = show, tell, on_event
        self.session = secrets.token_hex(8)
        self.stopping = False
        self.in_turn = SCHEMES[config.method].in_turn
        cluster_config = config.cluster
        self.budgets = Budgets(cluster_config.max_crashes, cluster_config.max_preemptions, cluster_config.backoff_s)
        manifest = read_manifest(run)
        self.stores = [run.child("blocks", f"{request.block:02d}") for request in wanted]
        self.checkpoints = [
            Checkpoints(store, plan_identity(manifest, block)) for block, store in enumerate(self.stores)
        ]
        self.states = [self._first_state(block) for block in range(len(wanted))]
        self.progress = [Progress(step=state.committed) for state in self.states]
        self.running: dict[int, Running] = {}

    def _first_state(self, block: int) -> BlockState:
        attempts = [int(name) for name in self.stores[block].child("attempts").list() if name.isdigit()]
        committed = self._committed(block)
        phase = Phase.DONE if committed >= self.config.training.steps else Phase.PENDING
        return BlockState(block, phase, attempt=max(attempts, default=0), committed=committed)

    def _committed(self, block: int) -> int:
        """Newest step that is committed and whole."""
        checkpoints = self.checkpoints[block]
        for step in reversed(checkpoints.steps()):
            if not checkpoints.verify(step):
                return step
        return 0

    def conduct(self) -> list[BlockState]:
        """Until every block is done, stopped or failed; returns the last states.

        Raises:
            PlacementError: a block fits on no node.
        """
        place(self.wanted, self.cluster.nodes())
        for state in self.states:
            self._record(state)
        while any(state.phase not in FINAL for state in self.states):
            self._admit()
            for block in list(self.running):
                self._follow(block)
            self.show(self.states, self.progress)
            time.sleep(POLL_S)
        self.show(self.states, self.progress)
        return self.states

    def stop(self, reason: str) -> None:
        """Ask all workers to commit and leave; nothing is started any more."""
        self.stopping = True
        self.run_store.write_json(STOP, {"session": self.session, "reason": reason, "pid": os.getpid()})

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
            if _fits(self.wanted[block], busy, nodes):
                self._start(block)
                busy.append(self.wanted[block])

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
        claim(self.stores[block], state.attempt, token)
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
        )
        name = f"{self.config.name}-block{block}-attempt{state.attempt}-{self.session[:6]}"
        tail = EventTail(self.stores[block].child("attempts", str(state.attempt)))
        self.progress[block].end = None
        self.running[block] = Running(self.cluster.start(assignment, request, name), tail)
        self._record(state)
        self.tell(f"block {block}: attempt {state.attempt} placed")

    def _follow(self, block: int) -> None:
        running_, progress = self.running[block], self.progress[block]
        over = running_.attempt.over  # asked before reading, so that the last events are not missed
        for event in running_.tail.read():
            progress.take(event)
            self.on_event(block, event)
            if event["event"] == "ready":
                self._record(running(self.states[block]))
                self.tell(f"block {block}: training from step {event['step']}")
            if event["event"] == "skipped":
                self.tell(f"block {block}: {event['reason']}")
        if over:
            del self.running[block]
            self._end(block, running_.attempt.error)

    def _end(self, block: int, error: str | None) -> None:
        self._record(dataclasses.replace(self.states[block], phase=Phase.LOST))
        exit_ = self._classify(block, error)
        state = ended(self.states[block], exit_, self.budgets, time.monotonic())
        self._record(state)
        if state.phase is Phase.DONE:
            self.tell(f"block {block}: done at step {exit_.step}")
        else:
            verdict = {Phase.PENDING: "comes back", Phase.STOPPED: "stopped", Phase.FAILED: "FAILED"}[state.phase]
            self.tell(f"block {block}: {exit_.kind}, committed step {exit_.step}; {verdict} ({exit_.reason})")

    def _classify(self, block: int, error: str | None) -> Exit:
        step, end = self._committed(block), self.progress[block].end
        if step >= self.config.training.steps:
            return Exit("done", "", step)
        if end is None and self.progress[block].warned:
            return Exit("stopped" if self.stopping else "preempted", str(self.progress[block].warned), step)
        if end is None:
            gone = error is not None and "node" in error and "died" in error
            return Exit("preempted" if gone else "crashed", error or "the workers ended without a word", step)
        if end["outcome"] == "stopped":
            return Exit("stopped" if self.stopping else "preempted", str(end.get("reason")), step)
        if end["outcome"] == "failed" and not end.get("retry"):
            return Exit("failed", str(end.get("error")), step)
        return Exit("crashed", str(end.get("error") or error), step)

    def _record(self, state: BlockState) -> None:
        self.states[state.block] = state
        content = {**dataclasses.asdict(state), "phase": state.phase.value, "since": time.time()}
        del content["not_before"]
        try:
            self.stores[state.block].write_json("state.json", content)
        except ShardError as error:
            # for `status` only; the commits are the truth
            self.tell(f"block {state.block}: its state could not be written ({error})")


def _fits(request: Request, busy: list[Request], nodes: list[Node]) -> bool:
    """Whether a block fits beside those that run; where exactly is Ray's business."""
    try:
        return place([*busy, request], nodes)[request.block] is not None
    except PlacementError:
        # a node went away and the block fits on none of the rest: it waits until one comes back
        return False
