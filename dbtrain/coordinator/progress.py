"""What a block's events say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbtrain.coordinator.placement import node_name


@dataclass
class Progress:
    """Updated by one event after the other, over all attempts."""

    step: int = 0
    loss: float | None = None
    validation: float | None = None
    """Newest loss on validation samples."""
    rate: float | None = None
    """Steps per second over the last log interval."""
    memory: int | None = None
    seconds: float = 0.0
    """Spent training, over all attempts that this command saw."""
    end: dict[str, Any] | None = None
    """How this attempt ended, as told by the rank that says most of it."""
    worker: str | None = None
    """Process and node of the first rank, in this attempt."""
    warned: str | None = None
    """The signal that told its workers to leave, in this attempt."""

    def take(self, event: dict[str, Any]) -> None:
        """Update by one event."""
        kind = event["event"]
        if kind in ("ready", "resumed", "step"):
            self.step = event["step"]
        if kind in ("resumed", "step"):
            self.loss = event.get("loss")
        if kind == "validation":
            self.validation = event["loss"]
        if kind == "step":
            self.rate = event["steps"] / event["seconds"] if event["seconds"] else None
            self.memory, self.seconds = event["memory"], self.seconds + event["seconds"]
        if kind == "start" and "pid" in event:
            self.worker = f"pid {event['pid']} on {node_of(event)}"
        if kind in ("start", "stopping"):
            self.warned = event.get("reason")
        if kind == "end" and _says_more(event, self.end):
            self.end = event


def node_of(start: Mapping[str, Any]) -> str:
    """The node that a worker's first event names, as in ``gpu7#3f9a (10.0.0.7)``: the name that `plan` and
    `doctor` give it, and its address, by which other tools know it. Older runs have the host alone."""
    name = node_name(str(start.get("host", "")), str(start.get("node", "")))
    return f"{name} ({start['address']})" if start.get("address") else name


def _says_more(new: dict[str, Any], old: dict[str, Any] | None) -> bool:
    """Whether an end tells better than the one before why the attempt ended;
    that of the first rank comes first.

    An error that another attempt would meet again counts above all. Of crashes the first is the cause, and
    the broken connections of those that waited are not; when the first rank went without a word, Ray knows
    more than the others.
    """
    if not new.get("rank"):
        return True
    if old is None or (new["outcome"] == "failed") != (old["outcome"] == "failed"):
        return bool(new["outcome"] == "failed" and (old is None or old["outcome"] not in ("done", "stopped")))
    return old["outcome"] not in ("done", "stopped") and bool(new["t"] < old["t"])
