"""Figures as SVG that takes its colours and its font from the page around it: light or dark as that is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, PAPER = "#010101", "#010102", "#010103"
"""They stand for the page's text, lines and background: `svg` puts the page's variables in their places."""
FINE, FAULT, PAUSE = "#010104", "#010105", "#010106"
NAMED = {INK: "--ink", FAINT: "--line", PAPER: "--paper", FINE: "--good", FAULT: "--bad", PAUSE: "--warn"}
SERIES = 8
"""Series that have colours of their own; of more blocks the colours go from the first to the last."""
PLACES = 256
"""Colours from one end of the ramp to the other."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
}


def colour(number: int, count: int) -> str:
    """The colour of one of several series, which `svg` knows."""
    if count <= SERIES:
        return f"#0202{number:02x}"
    return f"#0303{round(number * (PLACES - 1) / (count - 1)):02x}"


def css_colour(number: int, count: int) -> str:
    """The same colour as the page's style sheet calls it."""
    return _variable(colour(number, count))


def _variable(stand_in: str) -> str:
    if stand_in in NAMED:
        return f"var({NAMED[stand_in]})"
    place = int(stand_in[5:], 16)
    if stand_in.startswith("#0202"):
        return f"var(--series-{place})"
    return f"color-mix(in oklab, var(--ramp-last) {100 * place / (PLACES - 1):.1f}%, var(--ramp-first))"


@contextmanager
def axes(width: float = 7.6, height: float = 3.0) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many inches with one diagram, in the page's style while the context lasts."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        diagram = figure.subplots()
        diagram.patch.set_alpha(0)
        yield figure, diagram


def svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an element of an HTML page.

    Args:
        figure: drawn with the colours of this module.
        name: unique on the page; it begins the identifiers.
        title, description: what screen readers say of it.
    """
    out = StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name, "svg.id": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = out.getvalue()
    inside = drawn[drawn.index("<defs") : drawn.rindex("</svg>")]
    inside = re.sub(r'\bid="', f'id="{name}-', inside)
    inside = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", inside)
    inside = re.sub(r"#0[123]0[123][0-9a-f]{2}\b", lambda found: _variable(found.group()), inside)
    inside = re.sub(r"font: (?:(\d+(?:\.\d+)?px)|[^;\"]*?(\d+(?:\.\d+)?px))[^;\"]*", r"font-size: \1\2", inside)
    box = re.search(r'viewBox="([^"]+)"', drawn)
    assert box is not None, "matplotlib writes one"
    head = (
        f'<svg role="img" viewBox="{box.group(1)}" aria-labelledby="{name}-title {name}-desc" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return Markup(head + inside + "</svg>")  # noqa: S704  matplotlib escapes the texts in a figure
