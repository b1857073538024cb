"""What a block's events say of it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Updated by one event after the other, over all attempts."""

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
