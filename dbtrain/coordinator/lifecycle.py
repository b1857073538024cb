"""What happens when a worker ends: pure decisions, from a
block's state and how its attempt ended to its next state."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Literal

LONGEST_BACKOFF_S = 60.0
REPEATED = "{}; it came twice at the same step with no commit between, so it would come again: fix it, then resume"

ExitKind = Literal["done", "stopped", "preempted", "crashed", "failed"]


class Phase(str, Enum):
    """Where a block is."""

    PENDING = "pending"
    PLACED = "placed"
    RUNNING = "running"
    LOST = "lost"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    ELSEWHERE = "elsewhere"
    """Not asked of this command; another place may train it."""


FINAL = frozenset({Phase.DONE, Phase.STOPPED, Phase.FAILED, Phase.ELSEWHERE})


@dataclass(frozen=True)
class Exit:
    """How an attempt ended."""

    kind: ExitKind
    reason: str
    step: int
    """Newest committed step."""
    cause: str | None = None
    """An error of the program, with the step that it came at;
    None where something outside may have ended it."""


@dataclass(frozen=True)
class Budgets:
    """How often a block may come back."""

    max_crashes: int
    max_preemptions: int
    backoff_s: float


@dataclass(frozen=True)
class BlockState:
    """A block, as the coordinator sees it."""

    block: int
    phase: Phase = Phase.PENDING
    attempt: int = 0
    """Number of the newest attempt; 0 before the first."""
    committed: int = 0
    """Newest committed step known when the attempt started."""
    crashes: int = 0
    """Crashes since the last progress."""
    preemptions: int = 0
    restarts: int = 0
    not_before: float = 0.0
    """Monotonic time before which it is not started again."""
    error: str | None = None
    cause: str | None = None
    """Cause of the newest crash since the last commit, if one was known."""


def placed(state: BlockState) -> BlockState:
    """The block got its resources and its next attempt."""
    return dataclasses.replace(state, phase=Phase.PLACED, attempt=state.attempt + 1)


def running(state: BlockState) -> BlockState:
    """Its workers have started to train."""
    return dataclasses.replace(state, phase=Phase.RUNNING)


def ended(state: BlockState, exit_: Exit, budgets: Budgets, now: float) -> BlockState:
    """The next state after an attempt ended.

    Crashes and preemptions have budgets of their own, because a spot instance that is taken back says nothing
    about the program; a crash after new commits starts a new budget, because what made progress may do so
    again. An error of the program that comes twice at the same step without a commit between them would come
    at every further attempt.
    """
    if exit_.kind == "done":
        return dataclasses.replace(state, phase=Phase.DONE, committed=exit_.step, error=None)
    state = dataclasses.replace(state, error=exit_.reason)
    if exit_.kind == "stopped":
        return dataclasses.replace(state, phase=Phase.STOPPED, committed=exit_.step)
    if exit_.kind == "failed":
        return dataclasses.replace(state, phase=Phase.FAILED, committed=exit_.step)
    if exit_.kind == "preempted":
        return _preempted(state, exit_, budgets, now)
    return _crashed(state, exit_, budgets, now)


def _preempted(state: BlockState, exit_: Exit, budgets: Budgets, now: float) -> BlockState:
    count = state.preemptions + 1
    cause = None if exit_.step > state.committed else state.cause
    state = dataclasses.replace(state, preemptions=count, cause=cause)
    return _back(state, exit_, spent=count > budgets.max_preemptions, not_before=now)


def _crashed(state: BlockState, exit_: Exit, budgets: Budgets, now: float) -> BlockState:
    progress = exit_.step > state.committed
    count = 1 if progress else state.crashes + 1
    if exit_.cause and exit_.cause == state.cause and not progress:
        return dataclasses.replace(state, phase=Phase.FAILED, crashes=count, error=REPEATED.format(exit_.reason))
    cause = exit_.cause or (None if progress else state.cause)
    # the first restart is at once; the exponent is bounded, as a float's is
    pause = min(LONGEST_BACKOFF_S, budgets.backoff_s * 2 ** min(count - 2, 60)) if count > 1 else 0.0
    state = dataclasses.replace(state, crashes=count, cause=cause)
    return _back(state, exit_, spent=count > budgets.max_crashes, not_before=now + pause)


def _back(state: BlockState, exit_: Exit, spent: bool, not_before: float) -> BlockState:
    phase, restarts = (Phase.FAILED, state.restarts) if spent else (Phase.PENDING, state.restarts + 1)
    return dataclasses.replace(state, phase=phase, restarts=restarts, committed=exit_.step, not_before=not_before)
