"""The sections of the page: a figure, the same numbers as a table, and what was not measured."""

import time
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from dbtrain.evaluation.accuracy import CLASS
from dbtrain.evaluation.report import label, main_readout
from dbtrain.models.registry import architecture
from dbtrain.report import beyond, plots
from dbtrain.report.drawing import css_colour
from dbtrain.report.facts import Facts, Rival
from dbtrain.report.parts import Missing, Section, Table
from dbtrain.report.results import Evaluation
from dbtrain.telemetry.console import duration, size

MOST_BARS = 16
"""Blocks that a figure of memory shows, and up to which the table of blocks is open."""
MOST_CELLS = 60
"""Steps of a curve that its table shows, evenly chosen; the page would be mostly numbers otherwise."""


def sections(facts: Facts) -> tuple[list[Section], list[Missing]]:
    """All that there is to show of a run, and what there is not."""
    made = [
        _blocks(facts),
        _quality(facts),
        _curves(facts),
        _density(facts),
        _levels(facts),
        _samples(facts),
        _routing(facts),
        _costs(facts),
        _time(facts),
        beyond.sweep(facts),
        beyond.similarity(facts),
        beyond.ablation(facts),
    ]
    return [one for one in made if isinstance(one, Section)], [one for one in made if isinstance(one, Missing)]


def _blocks(facts: Facts) -> Section:
    count = len(facts.histories)
    histories = {block.name: (number, block) for number, block in enumerate(facts.histories)}
    rows = []
    for status in facts.statuses:
        row = status.row
        number, block = histories.get(row.name, (count, None))
        own = Markup('<span class="key" style="--key: {}"></span>{}').format(
            css_colour(number, max(count, number + 1)), row.name
        )
        state = Markup('<span class="state {}">{}</span>').format(row.phase, row.phase)
        line = plots.spark([loss for _, loss in block.losses]) if block else Markup("")
        rows.append(
            (
                own,
                f"{row.layers[0]}–{row.layers[1] - 1}",
                f"{row.levels[0]:.3g}–{row.levels[1]:.3g}" if facts.density else "-",
                state,
                f"{status.committed:,} of {row.steps:,}",
                line,
                _number(row.loss),
                _number(row.validation),
                duration(row.seconds),
                size(row.memory),
                str(row.restarts),
            )
        )
    level = facts.density.name if facts.density else "level"
    head = (
        "block", "layers", level, "state", "committed", "loss by step", "loss", "validation", "time", "peak memory",
        "restarts",
    )  # fmt: skip
    table = Table("State of every block", head, tuple(rows))
    words = "Every block trains alone, with a stem and a head of its own. The first one owns the most noise."
    return Section("blocks", "Blocks", words, tables=(table,), open=len(rows) <= MOST_BARS)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _quality(facts: Facts) -> Section | Missing:
    found = facts.itself.evaluation
    if found is None or not found.test:
        return Missing("How good the result is", "dbtrain eval RUN")
    name = main_readout(found.test, facts.config.evaluation.readout)
    measured = [(facts.itself, found.test[name]), *_scores(facts.rivals, found, name)]
    factor = 100 if found.row.percent else 1
    bars = [(_who(rival), factor * score, found.row.write(score), rival is facts.itself) for rival, score in measured]
    if facts.chance is not None:
        bars.append(("guessing", factor * facts.chance, found.row.write(facts.chance), False))
    better = f"; {found.row.better} is better" if isinstance(found.row.better, str) else ""
    return Section(
        "quality",
        "Quality",
        f"Test {found.row.label}, readout “{label(name)}”{better}. One seed each.",
        plots.bars("quality", f"Test {found.row.label}", bars, found.row.label),
        (_score_table(facts, found, name),),
    )


def _scores(rivals: Sequence[Rival], found: Evaluation, name: str) -> Iterator[tuple[Rival, float]]:
    for rival in rivals:
        other = rival.evaluation
        if other is not None and other.metric == found.metric and other.test:
            yield rival, other.test[main_readout(other.test, name)]


def _who(rival: Rival) -> str:
    return rival.kind.replace("_", " ").replace("diffusion blocks", "isolated blocks")


def _score_table(facts: Facts, found: Evaluation, main: str) -> Table:
    columns = [(split, scores) for split, scores in found.scores.items()]
    names = dict.fromkeys(name for _, scores in columns for name in scores)
    ordered = sorted(names, key=lambda name: (name.startswith(CLASS), name != main))
    rows = tuple(
        (label(name) + found.row.direction(name), *(_written(found, scores, name) for _, scores in columns))
        for name in ordered
    )
    head = ("readout", *(f"{split} {found.row.label}" for split, _ in columns))
    return Table(f"Scores of {facts.name}", head, rows)


def _written(found: Evaluation, scores: dict[str, float], name: str) -> str:
    return found.row.write(scores[name]) if name in scores else "-"


def _curves(facts: Facts) -> Section | Missing:
    told = [block for block in facts.histories if block.losses]
    if not told:
        return Missing("Losses by step: no worker has told any", "dbtrain resume RUN")
    table = []
    for block in told:
        measured = dict(block.validation)
        every = max(1, len(block.losses) * len(told) // MOST_CELLS)
        chosen = {*(step for step, _ in block.losses[::-1][::every]), *measured}
        losses = dict(block.losses)
        table += [(block.name, f"{s:,}", _number(losses.get(s)), _number(measured.get(s))) for s in sorted(chosen)]
    validated = any(block.validation for block in told)
    words = "Lines are losses in training, dots those on validation samples. " if validated else ""
    words += "Losses of different blocks are of different noise levels: compare a block with itself."
    if not validated:
        words += " Losses on validation samples were not measured: training.validate_every=N does."
    shown = Table("Losses by step, evenly chosen", ("block", "step", "loss", "validation"), tuple(table))
    return Section("curves", "Learning curves", words, plots.curves(facts.histories), (shown,))


def _density(facts: Facts) -> Section | None:
    found = facts.density
    if found is None:
        return None
    rows = tuple(
        (f"block {block}", f"{low:.6g}", f"{high:.6g}", f"{100 * share:.3g} %")
        for block, (high, low, share) in enumerate(zip(found.edges, found.edges[1:], found.shares, strict=False))
    )
    words = f"How often each {found.name} is drawn in training, and which block owns it."
    table = Table("Slices", ("block", f"lowest {found.name}", f"highest {found.name}", "share of the draws"), rows)
    return Section("density", "Noise and its slices", words, plots.density(found), (table,))


def _levels(facts: Facts) -> Section | Missing | None:
    if facts.density is None:
        return None
    if not facts.losses:
        return Missing("Loss by noise level", "dbtrain losses RUN")
    rows = tuple(
        (f"{p.level:.4g}", str(p.block), f"{p.loss:.5f}", f"{p.weighted:.4f}", "boundary" if p.boundary else "")
        for p in facts.losses
    )
    head = (facts.losses[0].level_name, "block", "loss", "weighted", "")
    words = "Where two slices meet, both neighbours are measured: the one that is higher is behind."
    figure = plots.by_level(facts.losses, facts.density.log)
    return Section("levels", "Loss by noise level", words, figure, (Table("Validation loss", head, rows),))


def _samples(facts: Facts) -> Section | Missing | None:
    kind = architecture(facts.config.model.arch)
    if facts.picture:
        image = Markup('<img class="samples" src="data:image/png;base64,{}" alt="{}">').format(
            facts.picture.content, f"Grid of samples drawn from the merged model of {facts.name}, the classes in turn"
        )
        return Section("samples", "Samples", "Drawn from noise by the merged model, the classes in turn.", image)
    if facts.texts:
        rows = tuple((text.prompt, text.text, f"{text.temperature:g}", str(text.seed)) for text in facts.texts)
        table = Table("Texts", ("prompt", "went on with", "temperature", "seed"), rows)
        return Section("samples", "Samples", "Written by the merged model; not chosen.", tables=(table,), open=True)
    if kind.continues:
        return Missing("A text that it writes", "dbtrain generate RUN --keep")
    return Missing("Samples", "dbtrain sample RUN") if kind.samples else None


def _routing(facts: Facts) -> Section | None:
    """Which block did which step of the samples; None with one block, or where the picture does not say."""
    drawn = facts.picture.drawn if facts.picture else None
    if drawn is None or len(drawn.edges) < 3 or not drawn.steps:
        return None
    counted, guided = drawn.counted(), f" and guidance {drawn.guidance:g}" if drawn.guidance != 1 else ""
    rows = tuple(
        (f"block {block}", f"{low:.6g}", f"{high:.6g}", str(steps), str(evaluations))
        for block, (high, low, (steps, evaluations)) in enumerate(
            zip(drawn.edges, drawn.edges[1:], counted, strict=False)
        )
    )
    head = ("block", f"lowest {drawn.level_name}", f"highest {drawn.level_name}", "steps", "evaluations of its network")
    words = (
        f"The samples above were drawn in {len(drawn.steps)} steps ({drawn.solver}{guided}, seed {drawn.seed}), from "
        "the most noise to the least. Each dot is a step, in the colour of the block that did it: the one that owns "
        "its level. Beside each slice stands how many steps its block did."
    )
    table = Table("Steps of each block", head, rows)
    return Section("routing", "Who denoised what", words, plots.walk(drawn), (table,))


def _costs(facts: Facts) -> Section | Missing:
    runs = [facts.itself, *facts.rivals]
    known = [run for run in runs if run.memory is not None]
    if not known:
        return Missing("Memory and time", "dbtrain resume RUN")
    bars = [(_who(run), (run.memory or 0) / 2**20, size(run.memory), run is facts.itself) for run in known]
    alone = len(known) == 1
    if alone:
        rows_of = [status.row for status in facts.statuses][:MOST_BARS]
        bars = [(row.name, (row.memory or 0) / 2**20, size(row.memory), True) for row in rows_of]
    rows = tuple(
        (
            _who(run), size(run.memory), duration(run.longest), duration(run.seconds),
            "-" if run.flops is None else f"{run.flops:.4g}",
        )
        for run in known
    )  # fmt: skip
    head = ("run", "peak memory of a worker", "longest worker", "all workers together", "FLOPs of training")
    words = (
        "Peak memory of one worker: on a CPU of its whole process, which is mostly libraries, on a GPU of what PyTorch "
        "allocated. Times are of training alone, on the machines that there were."
    )
    if alone:
        words += " Not compared: dbtrain compare trains the same layers end to end."
    figure = plots.bars("costs", "Peak memory of one worker", bars, "MiB")
    return Section("costs", "Memory and time", words, figure, (Table("Costs", head, rows),), open=True)


def _time(facts: Facts) -> Section | Missing:
    begun = [attempt.start for block in facts.histories for attempt in block.attempts]
    if not begun:
        return Missing("Attempts: no block was placed yet", "dbtrain resume RUN")
    began = min(begun)
    rows = tuple(
        (
            block.name, str(attempt.number), attempt.node or "-", duration(attempt.start - began),
            duration(attempt.end - began), f"{attempt.first_step:,}–{attempt.last_step:,}" if attempt.spoke else "-",
            str(attempt.commits), attempt.outcome, attempt.reason,
        )
        for block in facts.histories
        for attempt in block.attempts
    )  # fmt: skip
    head = ("block", "attempt", "node", "from", "to", "steps", "commits", "ended", "why")
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(began))
    words = (
        f"The first attempt began on {day} UTC. A cross is a fault, a dot the end of a block. A node has its host's "
        "name, the beginning of its id in Ray, and its address; an attempt whose workers never started has none."
    )
    extended = [when for when, _, _ in facts.extended]
    figure = plots.time_line(facts.histories, extended, began)
    return Section("time", "Attempts and faults", words, figure, (Table("Attempts", head, rows),))
