"""The judgement that the page begins with: is the run done, is its result good, what went wrong."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

from dbtrain.coordinator.lifecycle import Phase
from dbtrain.evaluation.losses import Point
from dbtrain.evaluation.report import label, main_readout
from dbtrain.report.facts import Facts, Rival
from dbtrain.report.history import History
from dbtrain.report.results import Evaluation

Tone = Literal["good", "warn", "bad"]

BEHIND = 1.1
"""A block is behind its neighbour if at their boundary its loss is so many times the other's."""
RISEN = 1.05
"""A validation loss has risen if the last is so many times the least."""
SPREAD = 2.0
"""Standard errors within which a difference may be chance."""
LEVEL = 0.01
"""Relative difference within which two scores are called level where no error is known."""
END_TO_END = "end_to_end"
LONGEST = 110
"""Letters of a reason in the verdict; the table of attempts has all of them."""
MOST_NAMED = 6
"""Faults or blocks that a sentence names; the tables have all."""


@dataclass(frozen=True)
class Remark:
    """One line of the verdict."""

    about: str
    tone: Tone
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a reader knows after the first lines."""

    tone: Tone
    headline: str
    remarks: tuple[Remark, ...]


def judge(facts: Facts) -> Verdict:
    """The verdict on a run."""
    progress, result = progress_of(facts), result_of(facts)
    remarks = [
        Remark("Training", progress.tone, progress.text),
        Remark("Result", result.tone, result.text),
        faults_of(facts),
        behind_of(facts),
    ]
    remarks += _left_out(facts)
    remarks += [Remark("Unreadable", "bad", line) for line in facts.told]
    order: tuple[Tone, ...] = ("bad", "warn", "good")
    worst = min((progress.tone, result.tone), key=order.index)
    return Verdict(worst, f"{progress.about} {result.about}".strip(), tuple(remarks))


def _left_out(facts: Facts) -> list[Remark]:
    """Results of another model than the one that is merged now."""
    if not facts.outdated:
        return []
    names, commands = (", ".join(dict.fromkeys(column)) for column in zip(*facts.outdated, strict=True))
    why = "of another model than the one that is merged now, as before more training. Made anew by"
    return [Remark("Left out", "warn", f"{names}: {why} {commands}.")]


def progress_of(facts: Facts) -> Remark:
    """Whether the run is done; `about` is the first part of the headline."""
    rows = [status.row for status in facts.statuses]
    share = sum(status.committed for status in facts.statuses) / max(1, sum(row.steps for row in rows))
    phases = {phase: [row.name for row in rows if row.phase == phase] for phase in {row.phase for row in rows}}
    so_far = f"{100 * share:.0f} % of all steps are committed"
    if failed := phases.get(Phase.FAILED.value):
        errors = [f"{s.row.name}: {s.error}" for s in facts.statuses if s.row.name in failed and s.error]
        text = f"{_listed([_names(failed) + ' failed'])} {_listed([so_far])} {_listed(errors)}"
        return Remark("Failed.", "bad", text)
    if len(phases.get(Phase.DONE.value, ())) == len(rows):
        who = f"All {len(rows)} blocks are" if len(rows) > 1 else "The only block is"
        text = f"{who} done{_lengths(facts)}"
        return Remark("Done.", "good", text + ("." if facts.merged else ", and not merged yet: dbtrain merge RUN."))
    working = [name for phase in (Phase.RUNNING.value, Phase.PLACED.value) for name in phases.get(phase, ())]
    if working:
        return Remark("Training now.", "warn", f"{_names(working)} at work, {so_far}{_lengths(facts)}.")
    left = [row.name for row in rows if row.phase != Phase.DONE.value]
    text = (
        f"{len(left)} of {len(rows)} are not done ({_names(left)}), {so_far}, and no command trains the run: dbtrain "
    )
    text += "resume RUN goes on."
    return Remark("Not finished.", "warn", text)


def _lengths(facts: Facts) -> str:
    steps = sorted({status.row.steps for status in facts.statuses})
    said = f" ({steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else "") + " steps)"
    return said + (f", extended from {facts.extended[0][1]:,} steps" if facts.extended else "")


def result_of(facts: Facts) -> Remark:
    """How good the result is beside what is known; `about` is the second part of the headline."""
    found = facts.itself.evaluation
    if found is None or not found.test:
        return Remark("Nobody has measured the result.", "warn", "Not measured: dbtrain eval RUN.")
    name = main_readout(found.test, facts.config.evaluation.readout)
    score = found.test[name]
    written = in_words(found, score)
    detail = f"Test split, readout: {label(name)}"
    parts = [f" The blocks were not done when it was measured ({found.unfinished})." if found.unfinished else ""]
    if facts.chance is not None:
        parts.append(f" Guessing would have {found.row.write(facts.chance)}.")
    rival = next((rival for rival in facts.rivals if rival.kind == END_TO_END and _comparable(found, rival)), None)
    if rival is not None:
        judged = _beside(found, name, rival, detail, "".join(parts), written)
    else:
        parts.append(" Not compared: dbtrain compare trains the same layers end to end with equal FLOPs.")
        guessing = f" (guessing: {found.row.write(facts.chance)})" if facts.chance is not None else ""
        told = f"{written}{guessing}, compared with nothing yet."
        judged = Remark(told, "warn", f"{detail}.{''.join(parts)}")
    if facts.chance is None or not _guessed(found, score, facts.chance):
        return judged
    return Remark(f"{written}: no better than guessing ({found.row.write(facts.chance)}).", "bad", judged.text)


def _guessed(found: Evaluation, score: float, chance: float) -> bool:
    """Whether a share of right answers is within what guessing may give on as many samples."""
    count = found.sizes.get("test")
    error = math.sqrt(chance * (1 - chance) / count) if count else 0.0
    return score <= chance + SPREAD * error


def _beside(found: Evaluation, name: str, rival: Rival, detail: str, more: str, written: str) -> Remark:
    """The result beside that of the network end to end."""
    assert rival.evaluation is not None, "asked of a rival that has scores"
    theirs = rival.evaluation.test[main_readout(rival.evaluation.test, name)]
    better, error = found.row.better, _error_of_difference(found, found.test[name], theirs)
    gain = found.test[name] - theirs if better == "higher" else theirs - found.test[name]
    within = abs(gain) < (SPREAD * error if error else LEVEL * abs(theirs))
    word = "level with" if within else "better than" if gain > 0 else "worse than"
    tone: Tone = "good" if within or gain > 0 else "warn"
    headline = f"{written}: {word} end to end ({found.row.write(theirs)})."
    if error:
        chance = (
            f"they differ by {found.row.write(abs(gain))}, and up to {found.row.write(SPREAD * error)} can be chance "
            "with so many test samples"
        )
    else:
        chance = "how much of a difference is chance is not known"
    known = f" One seed each; {chance}." + ("" if rival.done else " The run end to end is not done.")
    return Remark(headline, tone, f"{detail}; end to end {found.row.write(theirs)}.{known}{more}")


def _error_of_difference(found: Evaluation, ours: float, theirs: float) -> float | None:
    """Standard error of the difference of two shares of as many samples, as if they were independent."""
    count = found.sizes.get("test")
    if not found.row.percent or not count:
        return None
    return math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / count)


def _comparable(found: Evaluation, rival: Rival) -> bool:
    return rival.evaluation is not None and rival.evaluation.metric == found.metric and bool(rival.evaluation.test)


def in_words(found: Evaluation, score: float) -> str:
    """A score with its unit, as in ``83.29 % accuracy``."""
    number, name = found.row.write(score), found.row.label
    return f"{number} % {name.removesuffix(' %')}" if found.row.percent else f"{number} {name}"


def faults_of(facts: Facts) -> Remark:
    """What went wrong on the way, and what it cost."""
    found = [fault for block in facts.histories for fault in _faults(block)]
    reasons = dict.fromkeys(reason for reason, _ in found)
    told = [
        f"{_names([at for why, at in found if why == reason])}: {shorten(reason, LONGEST, placeholder=' ...')}"
        for reason in reasons
    ]
    if not found:
        return Remark("Faults", "good", "None: no attempt ended in one.")
    attempts = sum(len(block.attempts) for block in facts.histories)
    finished = all(status.row.phase == Phase.DONE.value for status in facts.statuses)
    after = " After each fault the block came back, and all blocks finished." if finished else ""
    text = f"{len(found)} of {attempts} attempts ended in a fault. {_listed(told)}{after}"
    return Remark("Faults", "good" if finished else "warn", text)


def _faults(block: History) -> Iterator[tuple[str, str]]:
    """Why, and where, each attempt ended that ended in a fault."""
    for number, attempt in enumerate(block.attempts):
        if not attempt.fault:
            continue
        if not attempt.spoke:
            yield attempt.reason, f"{block.name} before its workers had started"
            continue
        after = next((later for later in block.attempts[number + 1 :] if later.spoke), None)
        lost = 0 if after is None else attempt.last_step - after.first_step
        again = f" ({lost:,} {'step was' if lost == 1 else 'steps were'} done again)" if lost > 0 else ""
        yield attempt.reason or attempt.outcome, f"{block.name} after step {attempt.last_step:,}{again}"


def behind_of(facts: Facts) -> Remark:
    """Blocks that are worse than their neighbours at the level where they meet, or that learn by heart."""
    told = [*behind(facts.losses), *(line for block in facts.histories for line in _risen(block))]
    if told:
        return Remark("Blocks", "warn", _listed(told))
    if not facts.losses and facts.density is not None:
        return Remark("Blocks", "warn", "Not known by level: dbtrain losses RUN measures each block at its boundaries.")
    return Remark("Blocks", "good", "No block is behind its neighbour by more than a tenth where they meet.")


def behind(points: tuple[Point, ...]) -> Iterator[str]:
    """A sentence for each boundary at which one block is behind the other."""
    for level in sorted({point.level for point in points if point.boundary}, reverse=True):
        first, second = sorted((p for p in points if p.boundary and p.level == level), key=lambda p: p.loss)
        if second.loss > BEHIND * max(first.loss, 0.0):
            yield (
                f"block {second.block} is behind block {first.block} where they meet, at {first.level_name} "
                f"{level:.4g} (loss {second.loss:.4f} and {first.loss:.4f})"
            )


def _risen(block: History) -> Iterator[str]:
    if len(block.validation) < 2:
        return
    step, least = min(block.validation, key=lambda pair: pair[1])
    last = block.validation[-1][1]
    if last > RISEN * least:
        yield f"the validation loss of {block.name} rose from {least:.4f} at step {step:,} to {last:.4f}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"


def _listed(sentences: list[str]) -> str:
    shown = "; ".join(sentences[:MOST_NAMED])
    more = len(sentences) - MOST_NAMED
    whole = shown[:1].upper() + shown[1:]
    return f"{whole}; and {more} more." if more > 0 else f"{whole}." if shown else ""
