"""Tables for people: live while blocks train, plain lines where there is no terminal."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dbtrain.telemetry.layout import say, show_table
from dbtrain.telemetry.live_table import ASCII, DRAWN, Trace, bar, live_table
from dbtrain.telemetry.rows import STYLES, Row, duration, loss_of, most_telling, size

__all__ = ["LiveView", "Row", "blocks_table", "duration", "make_console", "most_telling", "size"]

PLAIN_EVERY_S = 60.0
"""Least time between two lines of a block where there is no terminal; what happens to it is told at once."""
COUNT_EVERY_S = 30.0

BAR = 24
"""Characters of a progress bar."""

VALIDATION = "validation"
"""Column that is shown where any block has such a loss."""


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "block": lambda row: row.name.removeprefix("block "),
    "layers": lambda row: f"{row.layers[0]}-{row.layers[1] - 1}",
    "levels": lambda row: f"{row.levels[0]:.3g}-{row.levels[1]:.3g}",
    "state": lambda row: row.phase,
    "step": lambda row: f"{row.step}/{row.steps}",
    "loss": lambda row: loss_of(row.loss),
    VALIDATION: lambda row: loss_of(row.validation),
    "steps/s": lambda row: "-" if row.rate is None else f"{row.rate:.1f}",
    "time": lambda row: duration(row.seconds),
    "ETA": lambda row: duration(row.eta),
    "peak mem": lambda row: size(row.memory),
    "restarts": lambda row: str(row.restarts),
}
MISSED_LEAST = ("steps/s", "peak mem", "layers", "levels", "time", "restarts")
"""Columns that make room in a narrow terminal, the first one first."""


def make_console() -> Console:
    """A console; where there is no terminal it is wide enough for the tables,
    whatever the width is said to be."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def blocks_table(rows: Sequence[Row], title: str | None = None, width: int | None = None) -> Table:
    """The table of all blocks; in a narrow terminal without the columns that are missed least.

    Args:
        rows: one for each block.
        title: above the table.
        width: characters that there are; all columns by default.
    """
    heading = {"levels": rows[0].level_name} if rows else {}
    columns = {heading.get(name, name): [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    if all(row.validation is None for row in rows):
        columns.pop(VALIDATION)
    for name in (heading.get(name, name) for name in MISSED_LEAST):
        # each column has a space on both sides and a line
        if width is None or sum(max(map(len, [n, *cells])) + 3 for n, cells in columns.items()) + 1 <= width:
            break
        columns.pop(name)
    table = Table(title=title, title_justify="left")
    for name in columns:
        left = ("state", "layers", *heading.values())
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for index, row in enumerate(rows):
        cells = {name: cells[index] for name, cells in columns.items()}
        cells["state"] = f"[{STYLES.get(row.phase, 'default')}]{row.phase}[/]"
        table.add_row(*cells.values())
    return table


class View(Protocol):
    """Who is told what a command or a function of :mod:`dbtrain.api` does while it does it."""

    def show(self, rows: Sequence[Row]) -> None:
        """The newest state of all blocks."""

    def count(self, what: str, done: int, of: int) -> None:
        """How far something has come that takes a while."""

    def tell(self, line: str) -> None:
        """One line of what happens."""

    def table(self, table: Table) -> None:
        """A table that is shown once."""


class SilentView:
    """A view that shows nothing, for programs that did not ask for output."""

    def show(self, rows: Sequence[Row]) -> None:
        """Show nothing."""

    def count(self, what: str, done: int, of: int) -> None:
        """Count nothing."""

    def tell(self, line: str) -> None:
        """Tell nothing."""

    def table(self, table: Table) -> None:
        """Show nothing."""


class LiveView:
    """What is redrawn in place on a terminal; elsewhere a line a block now and then."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._glyphs = DRAWN if console.encoding.lower().startswith("utf") else ASCII
        self._traces: dict[str, Trace] = {}
        self._said: dict[str, tuple[float, int]] = {}
        self._counting: tuple[str, float] | None = None

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            # a table stays; how far something has come that is over by now does not
            self._live.transient = self._counting is not None
            self._live.stop()

    def show(self, rows: Sequence[Row]) -> None:
        """Show the newest state."""
        self._counting = None
        if self._live:
            for row in rows:
                self._traces.setdefault(row.name, Trace()).take(row.step, row.loss)
            width, height = self.console.width, self.console.height
            self._live.update(live_table(rows, self._traces, width, height, self._glyphs))
            return
        for row in rows:
            then, step = self._said.get(row.name, (-math.inf, -1))
            moved = row.phase == "running" and row.loss is not None and row.step != step
            if moved and self.clock() - then >= PLAIN_EVERY_S:
                self._said[row.name] = self.clock(), row.step
                say(self.console, _line(row))

    def count(self, what: str, done: int, of: int) -> None:
        """How far something has come that takes a while, in the place of the table."""
        now = self.clock()
        if self._counting is None or self._counting[0] != what:
            self._counting = what, now
        if self._live:
            self._live.update(Text(f"{bar(done / of if of else 1.0, BAR, self._glyphs)} {done:,} of {of:,} {what}"))
        elif now - self._counting[1] >= COUNT_EVERY_S:
            self._counting = what, now
            say(self.console, f"{done:,} of {of:,} {what}")

    def tell(self, line: str) -> None:
        """One line above the table."""
        say(self.console, line)

    def table(self, table: Table) -> None:
        """A table above the live one."""
        show_table(self.console, table)


def _line(row: Row) -> str:
    told = {name: COLUMNS[name](row) for name in ("step", "loss", "steps/s", "ETA")}
    measured = "" if row.validation is None else f" (validation {loss_of(row.validation)})"
    return f"{row.name}: step {told['step']} loss {told['loss']}{measured} {told['steps/s']} steps/s ETA {told['ETA']}"
