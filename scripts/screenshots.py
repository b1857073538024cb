"""Pictures of a run's report for the documents: light, dark, and as narrow as a browser gets.

Command:  python scripts/screenshots.py RUN docs/pictures   (needs Chromium, Debian's package chromium)
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from dbtrain.report.facts import gather
from dbtrain.report.page import page
from dbtrain.run.run import Run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"light": (1000, 1560, []), "dark": (1000, 1560, ["--blink-settings=preferredColorScheme=0"])}
COLOURS = 128


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
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={picture}"]
        subprocess.run([*command, html.absolute().as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)


def main() -> None:
    """Write one picture for each view."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    facts = gather(Run.at(given.run))
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "report.html"
        html.write_text(page(facts))
        for view, (width, height, options) in VIEWS.items():
            picture = given.folder / f"report-{facts.name}-{view}.png"
            photograph(html, picture, width, height, options)
            print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
