"""Pictures for the documents: a run's report in light and dark, the terminal while it trained, its sweep, and
who denoised its samples.

Command:  python scripts/screenshots.py RUN docs/pictures   (needs Chromium, Debian's package chromium)
The terminal is replayed from the run's events up to some seconds after its first word.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME

from dbtrain.coordinator.progress import Progress
from dbtrain.report.facts import gather
from dbtrain.report.page import page
from dbtrain.run.plan import level_name
from dbtrain.run.run import Run, RunBlock
from dbtrain.telemetry.console import Row
from dbtrain.telemetry.events import read_events
from dbtrain.telemetry.live_table import DRAWN, Trace, live_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"light": (1000, 1560, []), "dark": (1000, 1560, ["--blink-settings=preferredColorScheme=0"])}
COLOURS = 128
ROUTED = "samples-routing.svg"
FRAME = 120
"""Pixels of a window that its frame may take; they are blank."""


def browser() -> str:
    """The first browser that is installed."""
    found = next((shutil.which(name) for name in BROWSERS if shutil.which(name)), None)
    if found is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    return found


def photograph(html: Path, picture: Path, width: int, height: int, options: list[str]) -> None:
    """The top of a page, in few colours, which keeps the file small."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height + FRAME}", f"--screenshot={picture}"]
        subprocess.run([*command, html.absolute().as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        small = image.convert("RGB").crop((0, 0, width, height)).quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)


def replayed(block: RunBlock, until: float) -> tuple[Row, Trace]:
    """A block as it was at a time, by what its workers had said."""
    progress, trace, phase = Progress(), Trace(), "pending"
    events = [(n, e) for n in block.attempts for e in read_events(block.attempt(n)) if e["t"] <= until]
    for _, event in events:
        progress.take(event)
        if event["event"] == "step":
            trace.take(event["step"], event["loss"])
        phase = {"start": "placed", "ready": "running", "end": event.get("outcome")}.get(event["event"], phase)
    later = [
        e for n in block.attempts for e in read_events(block.attempt(n)) if n == max((n for n, _ in events), default=0)
    ]
    silent = phase == "running" and all(event["t"] <= until for event in later)
    phase = "lost" if silent or phase == "crashed" else phase
    counted = {"step": progress.step, "steps": block.steps, "loss": progress.loss, "rate": progress.rate}
    known = {"seconds": progress.seconds, "memory": progress.memory, "validation": progress.validation}
    name, manifest = block.name, block.run.manifest
    restarts = max(0, len({n for n, _ in events}) - 1)
    own = block.identity
    row = Row(
        name, own.layers, own.edges, phase, restarts=restarts, level_name=level_name(manifest), **counted, **known
    )
    return row, trace


def terminal(run: Run, after: float, picture: Path) -> None:
    """The live table of 80 columns, so many seconds after the first word of a worker."""
    began = min(e["t"] for block in run.blocks for n in block.attempts for e in read_events(block.attempt(n)))
    shown = [replayed(block, began + after) for block in run.blocks]
    console = Console(record=True, width=80, height=24, file=io.StringIO(), force_terminal=True)
    console.print(live_table([row for row, _ in shown], {r.name: t for r, t in shown}, 80, 24, DRAWN))
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "terminal.html"
        html.write_text(console.export_html(inline_styles=True, theme=SVG_EXPORT_THEME))
        photograph(html, picture, 760, 20 * len(shown) + 80, [])


def main() -> None:
    """Write one picture for each view."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--after", type=float, default=30.0, help="seconds at which the terminal is shown")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    run = Run.at(given.run)
    facts = gather(run)
    terminal(run, given.after, given.folder / f"terminal-{facts.name}.png")
    for mine, theirs in {"sweep.png": f"sweep-{facts.name}.png", ROUTED: f"routing-{facts.name}.svg"}.items():
        if run.store.exists(mine):
            (given.folder / theirs).write_bytes(run.store.read(mine))
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "report.html"
        html.write_text(page(facts))
        for view, (width, height, options) in VIEWS.items():
            picture = given.folder / f"report-{facts.name}-{view}.png"
            photograph(html, picture, width, height, options)
            print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
