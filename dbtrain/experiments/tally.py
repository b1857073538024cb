"""Which faults are made how often, how many were, and whether the shards after them are the same."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table

WEIGHTS = {
    "worker SIGKILL": 5,
    "worker SIGKILL in a commit": 4,
    "worker SIGTERM": 3,
    "worker SIGUSR1": 1,
    "worker SIGSTOP, then SIGCONT": 5,
    "controller SIGKILL": 1,
    "command SIGKILL": 1,
    "command SIGINT": 1,
    "command SIGTERM": 1,
}
"""How often each kind of fault is drawn; it then waits until there is something that it can hit."""


@dataclass
class Tally:
    """What was done and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    commands: int = 0
    differences: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Faults by kind."""
        table = Table("fault", "times", title=f"{self.runs} run(s), {self.commands} command(s)", title_justify="left")
        for kind in WEIGHTS:
            table.add_row(kind, str(self.faults[kind]))
        table.add_row("all", str(self.faults.total()), style="bold")
        return table


def difference(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str | None:
    """One line that says which shards differ, or None."""
    if not wanted:
        return "there are no shards to compare with"
    missing = sorted(wanted.keys() - found.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    return f"missing {missing}, different {other}" if missing or other else None
