"""What a terminal shows while blocks train: one screen, however many blocks there are, however narrow it is.

The first line sums the run up. Below it every block has a line with a bar, its loss as a small curve and its
state in colour; where there is no room for all, those that need attention do, and a strip has one character
for each block.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dbtrain.telemetry.rows import PHASES, STYLES, Row, duration, loss_of, most_telling, size

BAR = 14
"""Characters of a block's bar."""
WHOLE_BAR = 24
"""Characters of the run's bar."""
CURVE = 10
"""Characters of the curve of a loss."""
MOST_POINTS = 128
"""Losses of a block that are kept for its curve; of more, every second one is forgotten."""
FRAME = 3
"""Lines beside the blocks: the summary, the heads of the columns, and the prompt."""
STRIP_SHARE = 3
"""The strip may take one of so many parts of the screen."""


@dataclass(frozen=True)
class Glyphs:
    """What is drawn with."""

    full: str
    rest: str
    heights: str
    """Steps of a curve, the lowest first."""
    marks: Mapping[str, str]
    """Stands before the name of a phase."""


DRAWN = Glyphs("━", "╶", "▁▂▃▄▅▆▇█", {"done": "✓", "running": "●", "failed": "✕", "lost": "!", "placed": "○"})
ASCII = Glyphs("#", "-", ".:-=+*#@", {"done": "+", "running": ">", "failed": "x", "lost": "!", "placed": "o"})
"""What is drawn with on terminals whose encoding has no more."""


@dataclass
class Trace:
    """The loss of one block by step."""

    points: list[tuple[int, float]] = field(default_factory=list)

    def take(self, step: int, loss: float | None) -> None:
        """Add a loss; a block that came back repeats steps, which take the place of those before."""
        if loss is None or not math.isfinite(loss) or (self.points and self.points[-1] == (step, loss)):
            return
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        self.points.append((step, loss))
        if len(self.points) > MOST_POINTS:
            self.points = self.points[-1::-2][::-1]

    def drawn(self, width: int, heights: str) -> str:
        """The curve in so many characters, between the least and the greatest loss that was seen."""
        losses = [loss for _, loss in self.points]
        if len(losses) < 2:
            return ""
        count = min(width, len(losses))
        chosen = [losses[round(i * (len(losses) - 1) / (count - 1))] for i in range(count)]
        low, high = min(losses), max(losses)
        span = (high - low) or 1.0
        return "".join(heights[round((loss - low) / span * (len(heights) - 1))] for loss in chosen)


def bar(share: float, width: int, glyphs: Glyphs) -> str:
    """A bar that is full to a share from 0 to 1."""
    full = min(width, max(0, math.floor(width * share)))
    return glyphs.full * full + glyphs.rest * (width - full)


def live_table(rows: Sequence[Row], traces: Mapping[str, Trace], width: int, height: int, glyphs: Glyphs) -> Group:
    """The whole screen.

    Args:
        rows: one for each block.
        traces: losses by the name of a block.
        width, height: width and height of the terminal, characters.
        glyphs: what is drawn with.
    """
    parts: list[Text | Table] = [summary(rows, width, glyphs)]
    room = max(1, height - FRAME)
    if len(rows) > room:
        lines = strip(rows, width, glyphs)
        if len(lines) <= height // STRIP_SHARE:
            parts += lines
            room = max(1, room - len(lines))
    shown, _ = most_telling(rows, room)
    parts.append(_table(shown, traces, width, glyphs))
    return Group(*parts)


def summary(rows: Sequence[Row], width: int, glyphs: Glyphs) -> Text:
    """How far all blocks are together, how many are in each phase, and when the last one is done."""
    share = sum(min(row.step, row.steps) for row in rows) / max(1, sum(row.steps for row in rows))
    line = Text(no_wrap=True, overflow="crop")
    line.append(bar(share, min(WHOLE_BAR, max(4, width // 4)), glyphs), STYLES["running"])
    line.append(f" {100 * share:3.0f} %")
    left = [row.eta for row in rows if row.eta is not None]
    line.append(f"  ETA {duration(max(left))}" if left else "")
    counts = Counter(row.phase for row in rows)
    for phase in sorted(counts, key=lambda phase: PHASES.get(phase, len(PHASES))):
        line.append("  ")
        line.append(f"{counts[phase]} {phase}", STYLES.get(phase, ""))
    line.truncate(width)
    return line


def strip(rows: Sequence[Row], width: int, glyphs: Glyphs) -> list[Text]:
    """One character for each block, in their order: its height is how far it is, its colour its phase."""
    lines = []
    for start in range(0, len(rows), width):
        line = Text(no_wrap=True)
        for row in rows[start : start + width]:
            share = min(1.0, row.step / max(1, row.steps))
            line.append(glyphs.heights[math.floor(share * (len(glyphs.heights) - 1))], STYLES.get(row.phase, "dim"))
        lines.append(line)
    return lines


def _state(row: Row, glyphs: Glyphs) -> str:
    return f"{glyphs.marks.get(row.phase, ' ')} {row.phase}"


def _columns(traces: Mapping[str, Trace], glyphs: Glyphs) -> dict[str, Callable[[Row], str]]:
    return {
        "block": lambda row: row.name.removeprefix("block "),
        "layers": lambda row: f"{row.layers[0]}-{row.layers[1] - 1}",
        "levels": lambda row: f"{row.levels[0]:.3g}-{row.levels[1]:.3g}",
        "state": lambda row: _state(row, glyphs),
        "": lambda row: bar(row.step / max(1, row.steps), BAR, glyphs),
        "step": lambda row: f"{row.step}/{row.steps}",
        "loss": lambda row: loss_of(row.loss),
        "curve": lambda row: traces[row.name].drawn(CURVE, glyphs.heights) if row.name in traces else "",
        "validation": lambda row: loss_of(row.validation),
        "steps/s": lambda row: "-" if row.rate is None else f"{row.rate:.1f}",
        "time": lambda row: duration(row.seconds),
        "ETA": lambda row: duration(row.eta),
        "peak mem": lambda row: size(row.memory),
        "restarts": lambda row: str(row.restarts or ""),
    }


MISSED_LEAST = ("peak mem", "steps/s", "time", "layers", "levels", "validation", "restarts", "curve", "", "ETA", "loss")
"""Columns that make room, the first one first."""


def _table(rows: Sequence[Row], traces: Mapping[str, Trace], width: int, glyphs: Glyphs) -> Table:
    columns = {name: [cell(row) for row in rows] for name, cell in _columns(traces, glyphs).items()}
    for name in ("validation", "restarts"):
        if all(cell in ("-", "") for cell in columns[name]):
            columns.pop(name)
    for name in MISSED_LEAST:
        if sum(max(map(len, [n, *cells]), default=0) + 1 for n, cells in columns.items()) <= width:
            break
        columns.pop(name, None)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    level = rows[0].level_name if rows else "levels"
    for name in columns:
        left = name in ("state", "", "curve", "levels")
        table.add_column(level if name == "levels" else name, justify="left" if left else "right", no_wrap=True)
    for index, row in enumerate(rows):
        style = STYLES.get(row.phase, "")
        coloured = {"state": style, "": style or "dim", "curve": "cyan"}
        table.add_row(*(Text(cells[index], coloured.get(name, "")) for name, cells in columns.items()))
    return table
