"""Make a run longer. Its run.json says so; `train` and `resume` then go on from the commits that are there.

What a longer schedule cannot go on from is set aside in the block's directory, never removed.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from dbtrain import __version__
from dbtrain.config import Config
from dbtrain.errors import ConfigError
from dbtrain.method.schemes import SCHEMES
from dbtrain.run.places import keep_place, place_of
from dbtrain.run.run import STATE, Run, RunBlock
from dbtrain.run.schedule import Schedule, lengths_of, with_lengths
from dbtrain.shards.extension import Extension, Stretch
from dbtrain.shards.storage.fence import claim
from dbtrain.shards.storage.lock import RunLock

KEYS = "training.steps=N, training.blocks.BLOCK.steps=N and cluster.restart_optimizer=true"


def extend(run: Run, wanted: Config, tell: Callable[[str], None]) -> Extension:
    """Make blocks of a run longer, under its lock.

    If it is killed, the run is as it was, or extended; or, under `wsd`, some blocks are set back to before
    their decay and would train the same steps again. The same call then extends the run.

    Args:
        run: the run.
        wanted: its configuration with the new lengths, and maybe with `cluster.restart_optimizer`.
        tell: gets a line for each block, with its schedule before and after.

    Raises:
        ConfigError: the run cannot be extended so; nothing was changed.
        RunLockedError: a command trains it.
        ShardError: the storage fails.
    """
    with RunLock(run.store, "dbtrain extend") as lock:
        _check_run(run)
        _check_keys(run, wanted)
        extension = Extension(
            round(time.time(), 3),
            __version__,
            lengths_of(run.config.training),
            lengths_of(wanted.training),
            tuple(_stretches(run, wanted)),
        )
        _check_optimizers(run, wanted, extension)
        for line in described(run, extension):
            tell(line)
        lock.check()
        apply(run, [extension], wanted.cluster.restart_optimizer)
    return extension


def apply(run: Run, extensions: Sequence[Extension], restart_optimizer: bool = False) -> None:
    """Set the blocks back to the steps that they go on from, then write extensions into run.json in one step.

    The caller holds the lock of the run.
    """
    for extension in extensions:
        for stretch in extension.stretches:
            _go_on_from(run.block(stretch.block), stretch.start)
    manifest, place = run.manifest, place_of(run.store)
    training = with_lengths(run.config.training, extensions[-1].after)
    config = run.config.model_copy(update={"training": training})
    stored = {**manifest.config, "training": training.model_dump(mode="json")}
    if restart_optimizer:
        stored["cluster"] = {**stored["cluster"], "restart_optimizer": True}
    run.record(
        replace(
            manifest,
            config=stored,
            config_hash=config.content_hash(),
            extensions=(*manifest.extensions, *extensions),
        )
    )
    keep_place(run.store, place)  # run.json is another file now, and this copy the same place


def _go_on_from(block: RunBlock, start: int) -> None:
    """Set aside the checkpoints after a step, if there are any, so that the block goes on from there."""
    block.store.remove(STATE)  # how its last command left it says nothing of a block that became longer
    if max(block.checkpoints.steps(), default=0) <= start:
        return
    # a new claim, as an attempt makes one: a worker of an earlier attempt can then commit nothing any more
    claim(block.store, block.placed + 1, secrets.token_hex(8))
    block.checkpoints.set_aside(start, aside(block))


def aside(block: RunBlock) -> str:
    """Folder in a block's directory for checkpoints that a longer schedule does not go on from."""
    return f"schedule_of_{block.steps}_steps"


def _check_run(run: Run) -> None:
    manifest, url = run.manifest, run.store.url
    if manifest.branch:
        raise ConfigError(f"{url} is the branch of a run: extend the run, whose directory is the one above")
    if SCHEMES[run.config.method].in_turn:
        raise ConfigError(
            f"{url} trains its blocks in turn (method={run.config.method}), each on the ones before as they were at "
            "their ends: it cannot be extended; start a longer run (name=..., training.steps=...)"
        )
    if run.config.init.branch and manifest.init is None:
        raise ConfigError(
            f"the branch that every block of {url} starts from is not trained yet: train it first "
            f"(dbtrain train {url} --blocks branch), and extend the run then"
        )


def _check_keys(run: Run, wanted: Config) -> None:
    """ConfigError unless nothing but lengths, and `cluster.restart_optimizer`, is different."""
    config = run.config
    cluster = wanted.cluster.model_copy(update={"restart_optimizer": config.cluster.restart_optimizer})
    training = with_lengths(wanted.training, lengths_of(config.training))
    if wanted.model_copy(update={"cluster": cluster, "training": training}) != config.model_copy(
        update={"training": with_lengths(config.training, lengths_of(config.training))}
    ):
        raise ConfigError(f"extend makes blocks longer, and changes nothing else: it takes {KEYS}")


def _stretches(run: Run, wanted: Config) -> list[Stretch]:
    """What becomes of each block that is asked for more steps.

    Raises:
        ConfigError: one is asked for fewer, or none for more.
    """
    after, stretches, shorter = lengths_of(wanted.training), [], []
    for block in run.blocks:
        steps = after.of(block.number)
        if steps < block.steps:
            shorter.append(f"block {block.number} has {block.steps} steps ({block.committed} are done), not {steps}")
        elif stretch := block.schedule.extended(block.number, steps, _can_go_on(block)):
            stretches.append(stretch)
    if shorter:
        raise ConfigError(f"a run can only become longer: {'; '.join(shorter)}: ask for more, or start another run")
    if not stretches:
        lengths = ", ".join(f"block {block.number} {block.steps}" for block in run.blocks)
        raise ConfigError(f"no block becomes longer, they have as many steps already ({lengths}): ask for more")
    return stretches


def _can_go_on(block: RunBlock) -> bool:
    """Whether there is a whole checkpoint of the step where its decay begins, or it has not come so far."""
    held = block.schedule.held
    if held is None:
        return False
    if block.committed <= held:
        return True
    return held in block.checkpoints.steps() and not block.checkpoints.verify(held)


def _check_optimizers(run: Run, wanted: Config, extension: Extension) -> None:
    """Refuse blocks whose optimizer state is gone, before `train` would refuse them."""
    if wanted.cluster.restart_optimizer:
        return
    for stretch in extension.stretches:
        block = run.block(stretch.block)
        commit = block.checkpoints.newest_commit()
        if commit is not None and commit.file_of("optim") is None:
            raise ConfigError(
                f"block {block.number} was done at step {commit.step} and gave up its optimizer's state "
                "(training.keep_optimizer=false), so it cannot be trained on as if without a break: add "
                "cluster.restart_optimizer=true to train it on with an optimizer that starts anew"
            )


LITTLE = 0.05
"""Share of the peak rate below which an extension says that it trains next to nothing."""


def _line(block: RunBlock, stretch: Stretch) -> str:
    """A block's schedule before and after."""
    before = block.schedule
    after = replace(before, stretches=(*before.stretches, stretch))
    name = f"block {block.number}: {before.end} steps become {stretch.end}"
    if stretch.start < before.end:
        return (
            f"{name}; it goes on at the peak rate from step {stretch.start}, where its decay began, and decays from "
            f"step {after.held} on: the schedule of a run that had {stretch.end} steps from the beginning"
        )
    first = "" if block.committed >= before.end else f"to step {before.end} as before; "
    low, top = before.scale(stretch.start), after.scale(stretch.start + stretch.rewarm)
    little = f"; at {top:.0%} of the peak rate it learns little: ask for more steps" if top < LITTLE else ""
    if not stretch.rewarm:
        held = f"from step {stretch.start} on the {before.curve} schedule of {stretch.end} steps holds"
        return f"{name}; {first}{held}{little}"
    return (
        f"{name}; {first}from step {stretch.start} on the rate climbs in {stretch.rewarm} steps from {low:.0%} to "
        f"{top:.0%} of its peak, where the {before.curve} schedule of {stretch.end} steps is then, and follows it to "
        f"{before.final:.0%}{little}"
    )


def described(run: Run, extension: Extension) -> list[str]:
    """What an extension does to each block, a line each, and what is set aside for it."""
    lines = []
    for stretch in extension.stretches:
        block = run.block(stretch.block)
        lines.append(_line(block, stretch))
        later = [step for step in block.checkpoints.steps() if step > stretch.start]
        if later:
            there = f"{block.path}/{aside(block)}"
            lines.append(f"block {block.number}: its checkpoints of step {', '.join(map(str, later))} go to {there}/")
    longer = {stretch.block for stretch in extension.stretches}
    for block in run.blocks:
        if block.number not in longer:
            key = f"training.blocks.{block.number}.steps"
            lines.append(f"block {block.number}: keeps its {block.steps} steps ({key} makes it longer)")
    if not any(block.committed for block in run.blocks):
        lines.append(
            "no block is trained here: if none is anywhere, a new run (name=...) has the plain schedule of its length"
        )
    return lines


def same_course(ours: Sequence[Extension], theirs: Sequence[Extension]) -> bool:
    """Whether two records say the same of the schedule; when they were made does not matter."""
    return [(e.before, e.after, e.stretches) for e in ours] == [(e.before, e.after, e.stretches) for e in theirs]


def trained_alike(ours: Schedule, theirs: Schedule, step: int) -> str | None:
    """Why a checkpoint made by another schedule is not one of ours, in words; None if it is."""
    if ours.agrees(theirs, step):
        return None
    since = next(s for s in (*ours.stretches, *theirs.stretches) if s.start < step)
    return (
        f"step {step} was trained by the schedule of {theirs.end} steps, and here that of {ours.end} holds, from which "
        f"it differs since step {since.start}"
    )
