"""Who denoised what: the levels of a solver's steps, each in the colour of the block that was asked there."""

from collections.abc import Callable
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from dbtrain.evaluation.images.drawn import Drawn

WIDE = 20.0
"""Ratio of the greatest level to the least from which on the axis of levels is logarithmic."""
MOST_NAMED = 8
"""The most blocks that are all named; of more the first and the last are."""


def draw(diagram: Axes, drawn: Drawn, colour: Callable[[int, int], str], ink: str, paper: str) -> None:
    """Draw the walk of a solver through the slices.

    Args:
        diagram: axes to draw on.
        drawn: how the samples were drawn.
        colour: (number of a block, number of blocks) -> its colour.
        ink, paper: colours of the lines, and around the marks of the steps.
    """
    count = len(drawn.edges) - 1
    levels = [level for level, _ in drawn.steps]
    if min(levels) > 0 and max(levels) > WIDE * min(levels):
        diagram.set_yscale("log")
        diagram.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    diagram.plot(range(1, len(levels) + 1), levels, color=ink, lw=0.8)
    size = 6.5 if len(levels) <= 60 else 4.0
    for block in range(count):
        own = [(step, level) for step, (level, asked) in enumerate(drawn.steps, 1) if asked == block]
        if own:
            diagram.plot(*zip(*own, strict=True), "o", color=colour(block, count), ms=size, mec=paper, mew=0.8)
    _slices(diagram, drawn, colour, ink)
    diagram.set(xlabel="step of the solver", ylabel=drawn.level_name)


def _slices(diagram: Axes, drawn: Drawn, colour: Callable[[int, int], str], ink: str) -> None:
    """A band for each slice, named beside it with the number of its steps; lines at the boundaries."""
    low, high = diagram.get_ylim()
    diagram.set_ylim(low, high)
    count, across = len(drawn.edges) - 1, diagram.get_yaxis_transform()
    for block, (steps, _) in enumerate(drawn.counted()):
        top, bottom = min(drawn.edges[block], high), max(drawn.edges[block + 1], low)
        if bottom >= top:
            continue
        diagram.axhspan(bottom, top, color=colour(block, count), alpha=0.12, lw=0, zorder=0)
        if count <= MOST_NAMED or block in (0, count - 1):
            middle = (top * bottom) ** 0.5 if diagram.get_yscale() == "log" else (top + bottom) / 2
            diagram.text(
                1.01, middle, f"block {block}: {steps}", color=colour(block, count), transform=across, va="center",
                fontweight="bold",
            )  # fmt: skip
    for edge in drawn.edges[1:-1]:
        diagram.axhline(edge, color=ink, lw=0.8, ls=(0, (3, 3)), zorder=0)


def svg(drawn: Drawn) -> bytes:
    """The figure as a file of its own."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    def colour(block: int, count: int) -> str:
        red, green, blue, _ = colormaps["viridis"](0.9 * block / max(1, count - 1), bytes=True)
        return f"C{block}" if count <= MOST_NAMED else f"#{red:02x}{green:02x}{blue:02x}"

    out = BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "routing"}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        draw(figure.subplots(), drawn, colour, "black", "white")
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
