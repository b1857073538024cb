"""Which faults are made how often, how many were, and whether the shards after them are the same."""

import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from rich.table import Table

Target = Literal["worker", "controller", "command"]


class Fault(Enum):
    """What is done to a run: whom it hits, with which signal, and what it is called."""

    WORKER_KILL = ("worker", signal.SIGKILL, "worker SIGKILL")
    WORKER_KILL_IN_COMMIT = ("worker", signal.SIGKILL, "worker SIGKILL in a commit")
    WORKER_TERM = ("worker", signal.SIGTERM, "worker SIGTERM")
    WORKER_USR1 = ("worker", signal.SIGUSR1, "worker SIGUSR1")
    WORKER_STOP = ("worker", signal.SIGSTOP, "worker SIGSTOP, then SIGCONT")
    CONTROLLER_KILL = ("controller", signal.SIGKILL, "controller SIGKILL")
    COMMAND_KILL = ("command", signal.SIGKILL, "command SIGKILL")
    COMMAND_INT = ("command", signal.SIGINT, "command SIGINT")
    COMMAND_TERM = ("command", signal.SIGTERM, "command SIGTERM")

    def __init__(self, target: Target, number: signal.Signals, words: str) -> None:
        self.target = target
        self.signal = number
        self.words = words


WEIGHTS = {
    Fault.WORKER_KILL: 5,
    Fault.WORKER_KILL_IN_COMMIT: 4,
    Fault.WORKER_TERM: 3,
    Fault.WORKER_USR1: 1,
    Fault.WORKER_STOP: 5,
    Fault.CONTROLLER_KILL: 1,
    Fault.COMMAND_KILL: 1,
    Fault.COMMAND_INT: 1,
    Fault.COMMAND_TERM: 1,
}
"""How often each kind of fault is drawn; it then waits until there is something that it can hit."""


@dataclass
class Tally:
    """What was done and what came of it."""

    faults: Counter[Fault] = field(default_factory=Counter)
    runs: int = 0
    commands: int = 0
    differences: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Faults by kind."""
        table = Table("fault", "times", title=f"{self.runs} run(s), {self.commands} command(s)", title_justify="left")
        for kind in WEIGHTS:
            table.add_row(kind.words, str(self.faults[kind]))
        table.add_row("all", str(self.faults.total()), style="bold")
        return table


def difference(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str | None:
    """One line that says which shards differ, or None."""
    if not wanted:
        return "there are no shards to compare with"
    missing = sorted(wanted.keys() - found.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    return f"missing {missing}, different {other}" if missing or other else None
