"""One block in a table, and how its values are written."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

STYLES = {"running": "green", "done": "bold green", "failed": "bold red", "lost": "red", "placed": "yellow"}

PHASES = {phase: rank for rank, phase in enumerate(("failed", "lost", "placed", "running", "pending"))}
"""Which blocks are shown first where there is no room for all."""


@dataclass(frozen=True)
class Row:
    """One block in a table."""

    name: str
    """`block 2`, or `branch`."""
    layers: tuple[int, int]
    """First layer, and the one after the last."""
    levels: tuple[float, float]
    """Noise levels, (low, high)."""
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
    level_name: str = "sigma"
    """What such levels are called."""
    validation: float | None = None
    """Newest loss on validation samples, where it is measured."""

    @property
    def eta(self) -> float | None:
        """Seconds left, if the block goes on at its rate."""
        return (self.steps - self.step) / self.rate if self.rate and self.phase == "running" else None


def loss_of(loss: float | None) -> str:
    """A loss with four digits, or a dash."""
    return "-" if loss is None else f"{loss:.4f}"


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


def most_telling(rows: Sequence[Row], most: int) -> tuple[list[Row], str | None]:
    """As many rows as a screen has room for, in their order, and a line that counts them all by their phase.

    Blocks that are lost or failed come before those that train, and those before what waits or is done. Where
    there is room for all there is no line.
    """
    if len(rows) <= most:
        return list(rows), None
    first = sorted(range(len(rows)), key=lambda index: (PHASES.get(rows[index].phase, len(PHASES)), index))[:most]
    counts = Counter(row.phase for row in rows)
    line = ", ".join(f"{count} {phase}" for phase, count in counts.most_common())
    return [rows[index] for index in sorted(first)], f"{len(rows)} rows, {len(rows) - most} not shown: {line}"
