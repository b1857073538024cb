"""The figures of the page: each takes what was gathered and draws it."""

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from dbtrain.evaluation.images import routing
from dbtrain.evaluation.images.drawn import Drawn
from dbtrain.evaluation.losses import Point
from dbtrain.evaluation.sweep.figure import draw
from dbtrain.evaluation.sweep.similarity import Beside
from dbtrain.evaluation.sweep.sweep import Sweep
from dbtrain.report.drawing import FAULT, FINE, INK, PAPER, PAUSE, SERIES, axes, colour, svg
from dbtrain.report.facts import Density
from dbtrain.report.history import Attempt, History

OUTCOMES = {"done": FINE, "running": FINE, "stopped": PAUSE, "placed": PAUSE}
"""Colours of attempts; all others are faults."""
MOST_NAMED = 16
"""Rows of a figure that each have a name beside them; of more every so many do."""
APART = 0.06
"""Least distance of two names beside curves, as a share of the height."""


def curves(histories: Sequence[History]) -> Markup:
    """The loss of every block by step, as lines; dots are measured on validation samples."""
    with axes(height=3.4) as (figure, diagram):
        ends = []
        for number, block in enumerate(histories):
            own = colour(number, len(histories))
            if block.losses:
                diagram.plot(*zip(*block.losses, strict=True), color=own, lw=1.8 if len(histories) <= SERIES else 1.1)
                ends.append((block.losses[-1][1], block.name, own))
            if block.validation and len(histories) <= SERIES:
                measured = list(zip(*block.validation, strict=True))
                diagram.plot(*measured, "o", color=own, ms=6, mec=PAPER, mew=1, ls=(0, (1, 3)), lw=1.2)
        diagram.set(xlabel="optimizer step", ylabel="loss, in the block's own slice")
        _log_if_wide(diagram, [loss for block in histories for _, loss in (*block.losses, *block.validation)])
        if len(histories) <= SERIES:
            _name_ends(diagram, ends)
        elif ends:
            _name_ends(diagram, [ends[0], ends[-1]])
        what = "Lines: loss in training, the mean since the dot before. Dots: loss on validation samples."
        return svg(figure, "curves", f"Loss of {len(histories)} block(s) by step", what)


def _log_if_wide(diagram: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span a factor of more than ten."""
    if values and min(values) > 0 and max(values) / min(values) > 10:
        diagram.set_yscale("log")
        diagram.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        diagram.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _name_ends(diagram: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """A name beside the end of each curve, moved where two would lie over each other."""
    diagram.get_ylim()  # settles the limits, which the transformation needs
    to_axes = diagram.transAxes.inverted()
    heights = [float(to_axes.transform(diagram.transData.transform((0.0, value)))[1]) for value, _, _ in ends]
    lowest = -math.inf
    for height, (_, name, own) in sorted(zip(heights, ends, strict=True)):
        lowest = max(height, lowest + APART)
        diagram.text(1.01, lowest, name, color=own, transform=diagram.transAxes, va="center", fontweight="bold")


def density(found: Density) -> Markup:
    """How often each level is trained, with the slices of the blocks below the curve."""
    count = len(found.shares)
    with axes(height=2.6) as (figure, diagram):
        for block, (high, low) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
            inside = [i for i, level in enumerate(found.levels) if low < level <= high]
            if inside:
                part = slice(max(0, inside[0] - 1), inside[-1] + 2)
                own = colour(block, count)
                diagram.fill_between(found.levels[part], found.density[part], color=own, alpha=0.35, lw=0)
            if inside and count <= MOST_NAMED:
                middle = _median(found, inside)
                name = f"block {block}" if count <= SERIES else str(block)
                diagram.text(middle, 0.02 * max(found.density), name, ha="center", va="bottom", color=INK)
        diagram.plot(found.levels, found.density, color=INK, lw=1.5)
        if count <= 4 * MOST_NAMED:
            for edge in found.edges[1:-1]:
                diagram.axvline(edge, color=INK, lw=0.8, ls=(0, (3, 3)))
        _levels_axis(diagram, found.name, found.log)
        diagram.set(ylabel="share of the draws", ylim=(0, None), yticks=[])
        slices = f"{count} slices meet at {', '.join(f'{edge:.4g}' for edge in found.edges[1:-1]) or 'no level'}."
        return svg(figure, "density", f"How often each {found.name} is trained", slices)


def _median(found: Density, inside: Sequence[int]) -> float:
    """The level with half of a slice's draws on either side."""
    total, half = 0.0, sum(found.density[i] for i in inside) / 2
    for i in inside:
        total += found.density[i]
        if total >= half:
            return found.levels[i]
    return found.levels[inside[-1]]


def _levels_axis(diagram: Axes, name: str, log: bool) -> None:
    if log:
        diagram.set_xscale("log")
        diagram.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        diagram.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _sparse(diagram) else ""))
    diagram.set_xlabel(f"{name}; the most noise is on the right")


def _sparse(diagram: Axes) -> bool:
    """Whether so few decades are shown that the marks between them need numbers too."""
    low, high = diagram.get_xlim()
    return high / max(low, 1e-300) < 20


def by_level(points: Sequence[Point], log: bool) -> Markup:
    """The loss of every block by noise level; at a boundary of both neighbours."""
    blocks = sorted({point.block for point in points})
    count = max(blocks) + 1
    with axes(height=3.0) as (figure, diagram):
        ends = []
        for block in blocks:
            own = sorted((point for point in points if point.block == block), key=lambda point: point.level)
            xs, ys = [point.level for point in own], [point.loss for point in own]
            diagram.plot(xs, ys, "o-", color=colour(block, count), ms=4, mec=PAPER, mew=0.8)
            ends.append((xs[len(xs) // 2], ys[len(ys) // 2], f"block {block}", colour(block, count)))
        for edge in {point.level for point in points if point.boundary}:
            diagram.axvline(edge, color=INK, lw=0.8, ls=(0, (3, 3)), zorder=0)
        for x, y, name, own_colour in ends if count <= SERIES else (ends[0], ends[-1]):
            diagram.annotate(
                name, (x, y), (0, 9), textcoords="offset points", ha="center", color=own_colour, weight="bold"
            )
        _levels_axis(diagram, points[0].level_name, log)
        diagram.set(ylabel="validation loss")
        diagram.margins(y=0.18)
        words = "Dashed lines are boundaries, where both neighbours are measured."
        return svg(figure, "levels", "Validation loss by noise level", words)


def bars(name: str, title: str, rows: Sequence[tuple[str, float, str, bool]], unit: str) -> Markup:
    """Horizontal bars.

    Args:
        name, title: name and title of the figure.
        rows: (label, value, how it is written, whether it is this run's), the first one on top.
        unit: unit of the values.
    """
    with axes(height=0.7 + 0.34 * len(rows)) as (figure, diagram):
        for place, (_, value, written, own) in enumerate(rows):
            diagram.barh(place, value, height=0.62, color=colour(0, 1) if own else INK, alpha=1 if own else 0.35)
            diagram.annotate(written, (value, place), (4, 0), textcoords="offset points", va="center")
        diagram.set_yticks(range(len(rows)), [label for label, *_ in rows])
        diagram.invert_yaxis()
        diagram.grid(axis="y", visible=False)
        diagram.set(xlabel=unit, xlim=(0, 1.18 * max((value for _, value, *_ in rows), default=1) or 1))
        return svg(figure, name, title, "; ".join(f"{label}: {written}" for label, _, written, _ in rows))


def time_line(histories: Sequence[History], extended: Sequence[float], began: float) -> Markup:
    """When each block was trained: a bar for each attempt, a cross where one ended in a fault."""
    scale, unit = _unit(max((a.end for block in histories for a in block.attempts), default=began) - began)
    with axes(height=0.9 + (0.3 if len(histories) <= MOST_NAMED else 0.1) * len(histories)) as (figure, diagram):
        for place, block in enumerate(histories):
            for attempt in block.attempts:
                _attempt_bar(diagram, place, attempt, began, scale)
        for when in extended:
            diagram.axvline((when - began) / scale, color=INK, lw=1, ls=(0, (3, 3)))
            diagram.annotate(
                "extended", ((when - began) / scale, 1), (3, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="bottom",
            )  # fmt: skip
        every = max(1, math.ceil(len(histories) / MOST_NAMED))
        diagram.set_yticks(range(0, len(histories), every), [block.name for block in histories[::every]])
        diagram.set_ylim(len(histories) - 0.4, -0.6)
        diagram.grid(axis="y", visible=False)
        diagram.set(xlabel=f"{unit} since the first attempt began")
        faults = sum(attempt.fault for block in histories for attempt in block.attempts)
        count = sum(len(block.attempts) for block in histories)
        return svg(figure, "time", "Attempts and faults", f"{count} attempt(s), {faults} ended in a fault (crosses).")


def _attempt_bar(diagram: Axes, place: int, attempt: Attempt, began: float, scale: float) -> None:
    start, end = (attempt.start - began) / scale, (attempt.end - began) / scale
    own = FAULT if attempt.fault else OUTCOMES.get(attempt.outcome, INK)
    diagram.barh(place, max(end - start, 0.0), left=start, height=0.6, color=own, alpha=0.55, lw=0)
    if attempt.fault:
        diagram.plot([end], [place], "X", color=FAULT, ms=9, mec=PAPER, mew=1, clip_on=False)
    elif attempt.outcome == "done":
        diagram.plot([end], [place], "o", color=FINE, ms=7, mec=PAPER, mew=1, clip_on=False)


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def quality_by_blocks(series: Sequence[tuple[str, Sequence[tuple[int, float, float]]]], label: str) -> Markup:
    """The table of an ablation: (name, [(blocks, mean, standard deviation over the seeds)]) for each line."""
    with axes(height=2.8) as (figure, diagram):
        for number, (name, points) in enumerate(series):
            xs, ys, errors = zip(*points, strict=True)
            own = colour(number, len(series))
            diagram.errorbar(xs, ys, errors, marker="o", capsize=3, color=own, mec=PAPER, label=name)
        diagram.set(xlabel="blocks", ylabel=label)
        diagram.set_xticks(sorted({x for _, points in series for x, _, _ in points}))
        diagram.legend(frameon=False)
        names = ", ".join(name for name, _ in series)
        return svg(figure, "ablation", f"{label} by the number of blocks", f"One line each: {names}.")


def sweep(found: Sweep) -> Markup:
    """r of every concept set by layer, with its interval; dashed lines are suggested boundaries."""
    with axes(height=3.2) as (figure, diagram):
        draw(diagram, found, colour, INK, PAPER)
        names = ", ".join(one.name for one in found.sets)
        return svg(figure, "sweep", "Agreement of each layer with behaviour", f"Concept sets: {names}.")


def similarity(pairs: Sequence[Beside]) -> Markup:
    """CKA of the same layer of each pair of networks."""
    with axes(height=2.6) as (figure, diagram):
        for number, pair in enumerate(pairs):
            name = f"{pair.one} and {pair.two}"
            diagram.plot(pair.layers, pair.cka, "o-", color=colour(number, len(pairs)), mec=PAPER, label=name)
            diagram.plot(pair.layers, pair.permuted, ":", color=colour(number, len(pairs)))
        diagram.set(xlabel="layer", ylabel="CKA", ylim=(min(0.0, *(min(pair.cka) for pair in pairs)), 1.02))
        diagram.legend(frameon=False)
        said = "; ".join(f"{pair.one} and {pair.two}: {pair.cka[-1]:.2f} in the last layer" for pair in pairs)
        return svg(figure, "cka", "Similarity of the same layer of two networks", said)


def walk(drawn: Drawn) -> Markup:
    """The levels of a solver's steps, in the colours of the blocks that did them."""
    with axes(height=3.2) as (figure, diagram):
        routing.draw(diagram, drawn, colour, INK, PAPER)
        said = "; ".join(f"block {block}: {steps} steps" for block, (steps, _) in enumerate(drawn.counted()))
        return svg(figure, "walk", f"{drawn.level_name} at each step of the solver, by block", said)


def spark(values: Sequence[float], width: int = 90, height: int = 20) -> Markup:
    """A curve without axes for a cell of a table, between its own least and greatest value."""
    if len(values) < 2:
        return Markup("")
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(
        f"{i * width / (len(values) - 1):.1f},{1 + (height - 2) * (high - value) / span:.1f}"
        for i, value in enumerate(values)
    )
    return Markup(
        '<svg class="spark" aria-hidden="true" viewBox="0 0 {} {}" preserveAspectRatio="none">'
        '<polyline points="{}" fill="none" stroke="currentColor" vector-effect="non-scaling-stroke"/></svg>'
    ).format(width, height, points)
