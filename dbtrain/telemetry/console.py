"""Tables for people: live while blocks train, plain lines where there is no terminal."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

PLAIN_EVERY_S = 10.0

STYLES = {"running": "green", "done": "bold green", "failed": "bold red", "lost": "red", "placed": "yellow"}


@dataclass(frozen=True)
class Row:
    """One block in a table."""

    block: int
    layers: tuple[int, int]
    levels: tuple[float, float]
    """(low, high)."""
    phase: str
    step: int
    steps: int
    loss: float | None
    rate: float | None
    """Steps per second."""
    seconds: float
    memory: int | None
    """Peak bytes of a worker."""
    restarts: int
    """Attempts placed after the first, by any command."""

    @property
    def eta(self) -> float | None:
        """Seconds left, if the block goes on at its rate."""
        return (self.steps - self.step) / self.rate if self.rate and self.phase == "running" else None


def make_console() -> Console:
    """A console; where there is no terminal it is wide enough for the tables, whatever the width is said to be."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def duration(seconds: float | None) -> str:
    """Seconds as people write them."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float | None) -> str:
    """Bytes in GiB (G) or MiB (M)."""
    if count is None:
        return "-"
    return f"{count / 2**30:.2f}G" if count >= 2**30 else f"{count / 2**20:.1f}M"


def blocks_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The table of all blocks."""
    table = Table(title=title, title_justify="left")
    for name in ("block", "layers", "sigma", "state", "step", "loss", "steps/s", "time", "ETA", "peak mem", "restarts"):
        table.add_column(name, justify="left" if name in ("state", "sigma", "layers") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.block),
            f"{row.layers[0]}-{row.layers[1] - 1}",
            f"{row.levels[0]:.3g}-{row.levels[1]:.3g}",
            f"[{STYLES.get(row.phase, 'default')}]{row.phase}[/]",
            f"{row.step}/{row.steps}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if row.rate is None else f"{row.rate:.1f}",
            duration(row.seconds),
            duration(row.eta),
            size(row.memory),
            str(row.restarts),
        )
    return table


class LiveView:
    """A table that is redrawn in place on a terminal; elsewhere a line a block now and then."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._last = -PLAIN_EVERY_S
        self._shown: list[tuple[str, int]] = []

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, rows: Sequence[Row]) -> None:
        """Show the newest state."""
        if self._live:
            self._live.update(blocks_table(rows))
            return
        shown = [(row.phase, row.step) for row in rows]
        if shown == self._shown or self.clock() - self._last < PLAIN_EVERY_S:
            return
        self._last, self._shown = self.clock(), shown
        for row in rows:
            if row.phase == "running":
                loss = "-" if row.loss is None else f"{row.loss:.4f}"
                rate = "-" if row.rate is None else f"{row.rate:.1f}"
                self.console.print(
                    f"block {row.block}: step {row.step}/{row.steps} loss {loss} {rate} steps/s ETA "
                    f"{duration(row.eta)}",
                    highlight=False,
                )

    def tell(self, line: str) -> None:
        """One line above the table."""
        self.console.print(line, highlight=False, markup=False)

    def table(self, table: Table) -> None:
        """A table above the live one."""
        self.console.print(table)
