"""The figure of a sweep: r of every concept set by layer, its interval, and the suggested boundaries."""

from collections.abc import Callable
from io import BytesIO

from matplotlib.axes import Axes

from dbtrain.evaluation.sweep.sweep import Sweep


def draw(diagram: Axes, found: Sweep, colour: Callable[[int, int], str], ink: str, paper: str) -> None:
    """Draw a sweep.

    Args:
        diagram: axes to draw on.
        found: the sweep that is drawn.
        colour: (number of a set, number of sets) -> its colour.
        ink, paper: colours of boundaries, and inside the marks of layers without the behaviour's order.
    """
    for number, one in enumerate(found.sets):
        own, layers = colour(number, len(found.sets)), [row.layer for row in one.layers]
        low, high = [row.low for row in one.layers], [row.high for row in one.layers]
        diagram.fill_between(layers, low, high, color=own, alpha=0.15 if len(found.sets) <= 2 else 0.07, lw=0)
        diagram.plot(layers, [row.r for row in one.layers], color=own, label=one.name)
        for row in one.layers:
            diagram.plot([row.layer], [row.r], "o", ms=5, color=own, mfc=own if one.marked(row) else paper)
    for phases in found.phases:
        for place in phases.after:
            style = (0, (4, 3)) if phases.phases == found.phases[0].phases else (0, (1, 3))
            diagram.axvline(place + 0.5, color=ink, lw=1, ls=style)
    diagram.axhline(0, color=ink, lw=0.6)
    diagram.set(xlabel="layer", ylabel="r with behaviour", ylim=(-0.6, 1.05))
    diagram.legend(frameon=False, loc="lower right", ncols=2)


def png(found: Sweep) -> bytes:
    """The figure as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    draw(figure.subplots(), found, lambda number, count: f"C{number}", "black", "white")
    out = BytesIO()
    figure.savefig(out, dpi=130, format="png")
    return out.getvalue()
