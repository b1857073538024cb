"""What happened to a block, from the events of its attempts: its losses by step, and when it was trained."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dbtrain.coordinator.exit_reasons import in_words
from dbtrain.coordinator.progress import node_of
from dbtrain.errors import ShardError
from dbtrain.run.run import RunBlock
from dbtrain.telemetry.events import COORDINATOR, EventTail, read_events

PLACED = "placed"
"""Outcome of an attempt whose workers have yet to start."""
FINE = ("done", "stopped", "running", PLACED)
"""Ends of an attempt that are no fault."""
LOST = "lost"
"""Outcome of an attempt whose workers went without a word."""
WITH_ITS_COMMAND = "the command that trained it ended without a word, and its workers with it"
"""A living command writes down what Ray said of the workers that it loses, so nothing of that is there."""
BEFORE_A_WORD = "the command that placed it ended before its workers had started"


@dataclass(frozen=True)
class Attempt:
    """One attempt of a block."""

    number: int
    spoke: bool
    """Whether a worker of it has said a word."""
    node: str
    """Node of the first worker, as `status` names it; '' where no worker has said a word."""
    start: float
    """When its first worker started, or, of one without a word, when it was placed; seconds since the epoch,
    as all times here."""
    end: float
    """When it ended; if it has not told how it ended, the time of its last event."""
    outcome: str
    """``done``, ``stopped``, ``failed``, ``crashed``, ``fenced``, ``lost``, ``placed`` or ``running``."""
    reason: str
    """Why it ended so, '' where that goes without saying."""
    first_step: int
    """The step that it began from."""
    last_step: int
    commits: int

    @property
    def fault(self) -> bool:
        """Whether it ended as nobody wanted."""
        return self.outcome not in FINE


@dataclass(frozen=True)
class History:
    """A block over all its attempts."""

    name: str
    """``block 2``, or ``branch``."""
    losses: tuple[tuple[int, float], ...]
    """(step, mean loss since the one before), rising; of steps that were repeated the newest."""
    validation: tuple[tuple[int, float], ...]
    """(step, loss on validation samples)."""
    attempts: tuple[Attempt, ...]
    told: tuple[str, ...] = ()
    """What could not be read."""


def history(block: RunBlock, under_command: bool) -> History:
    """Read the events of a block.

    Args:
        block: block of a run.
        under_command: whether a command trains it now, so that an attempt without an end is no fault.
    """
    losses: dict[int, float] = {}
    validation: dict[int, float] = {}
    attempts, told = [], []
    numbers = block.attempts
    for number in numbers:
        try:
            events = read_events(block.attempt(number))
            of_command = EventTail(block.attempt(number), COORDINATOR).read()
        except ShardError as error:
            told.append(str(error))
            continue
        losses |= dict(_losses(events, "step"))
        validation |= dict(_losses(events, "validation"))
        if events or of_command:
            attempts.append(_attempt(number, events, of_command, under_command and number == numbers[-1]))
    return History(block.name, _by_step(losses), _by_step(validation), tuple(attempts), tuple(told))


def _losses(events: list[dict[str, Any]], kind: str) -> Iterator[tuple[int, float]]:
    for event in events:
        if event["event"] != kind:
            continue
        step, loss = event.get("step"), event.get("loss")
        if (
            isinstance(step, int) and isinstance(loss, float) and math.isfinite(loss)
        ):  # the one before a failure may not be
            yield step, loss


def _by_step(losses: dict[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(losses.items()))


def _attempt(
    number: int, events: list[dict[str, Any]], of_command: list[dict[str, Any]], under_command: bool
) -> Attempt:
    steps = [event["step"] for event in events if isinstance(event.get("step"), int)]
    told = events or of_command  # of an attempt whose workers never spoke there is only what its command wrote
    end = next((event for event in reversed(told) if event["event"] == "end"), None)
    outcome, reason = _ending(end, of_command, under_command, silent=not events)
    return Attempt(
        number=number,
        spoke=bool(events),
        node=node_of(events[0]) if events else "",
        start=float(told[0]["t"]),
        end=float(end["t"] if end else max(event["t"] for event in [*events, *of_command])),
        outcome=outcome,
        reason=reason,
        first_step=next((e["step"] for e in events if e["event"] == "ready" and isinstance(e.get("step"), int)), 0),
        last_step=max(steps, default=0),
        commits=sum(event["event"] == "commit" for event in events),
    )


def _ending(
    end: dict[str, Any] | None, of_command: list[dict[str, Any]], under_command: bool, silent: bool
) -> tuple[str, str]:
    """(outcome, reason): the workers' own word comes before the cluster's."""
    if end is not None:
        return str(end.get("outcome")), str(end.get("error") or end.get("reason") or "")
    died = [event for event in of_command if event["event"] == "died"]
    if died:
        return LOST, in_words(str(died[-1].get("error")))
    if under_command:
        return (PLACED if silent else "running"), ""
    return LOST, BEFORE_A_WORD if silent else WITH_ITS_COMMAND
