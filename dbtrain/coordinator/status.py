"""What a run is doing, from its files alone."""

import time
from dataclasses import dataclass, replace
from typing import Any

from dbtrain.coordinator.lifecycle import FINAL, Phase
from dbtrain.coordinator.progress import Progress
from dbtrain.errors import ShardError
from dbtrain.run.branch import awaits_branch
from dbtrain.run.plan import level_name
from dbtrain.run.run import BRANCH, STATE, Run, RunBlock
from dbtrain.shards.storage.lock import holder_of, is_held
from dbtrain.telemetry.console import Row
from dbtrain.telemetry.events import read_events


@dataclass(frozen=True)
class BlockStatus:
    """One block of a run."""

    row: Row
    attempts: int
    """Placed so far, whether or not a worker ever said a word."""
    committed: int
    since: float | None
    """Seconds since the last change of its phase, if that is known."""
    error: str | None
    worker: str | None = None
    """Process and node of the first rank, while the block trains."""
    origin: str = ""
    """Attempt and place that made the last commit, as a part of a sentence; '' where that is not known."""


def preparation(run: Run) -> str | None:
    """What a command does that works on a run and has not written its run.json yet, in words; None otherwise.

    Raises:
        ShardError: the storage cannot be reached.
    """
    holder = None if run.exists else holder_of(run.store)
    if holder is None:
        return None
    return (
        f"{run.store.url} is being prepared by pid {holder.pid} on {holder.host}: its data are read, and a pilot may "
        "calibrate its range; there is no block yet"
    )


def status(run: Run) -> list[BlockStatus]:
    """Every block of a run, running or not.

    Raises:
        ShardError: it is no run, or its manifest is damaged.
    """
    statuses = [*branch_rows(run), *(block_status(block) for block in run.blocks)]
    # after the blocks: a command that ends meanwhile has
    # written their last states before it gives the lock back
    return statuses if is_held(run.store) else [_without_command(status) for status in statuses]


def _without_command(status: BlockStatus) -> BlockStatus:
    """A command that was killed leaves its blocks in the phases that they had."""
    phase = status.row.phase
    if status.since is None or phase in {final.value for final in FINAL}:
        return status
    error = f"no command runs, it was {phase}: the same command, or dbtrain resume, continues it"
    before = f"; before: {status.error}" if status.error else ""
    return replace(
        status, row=replace(status.row, phase=Phase.LOST.value), since=None, error=error + before, worker=None
    )


def branch_rows(run: Run) -> list[BlockStatus]:
    """The branch of a run, where it has one; none if that was removed once no block needed it any more."""
    if not run.config.init.branch or not (run.branch.exists or awaits_branch(run)):
        return []
    return [branch_status(run)]


def branch_status(run: Run) -> BlockStatus:
    """The branch of a run that has one, whether or not it has begun."""
    if run.branch.exists:
        return block_status(run.branch.block(0))
    branch, rows = run.config.init.branch, [block.identity for block in run.blocks]
    assert branch is not None, "asked of a run that has one"
    row = Row(
        name=BRANCH,
        layers=rows[0].layers,
        levels=(rows[-1].edges[0], rows[0].edges[1]),
        phase=Phase.PENDING.value,
        step=0,
        steps=branch.steps,
        loss=None,
        rate=None,
        seconds=0.0,
        memory=None,
        restarts=0,
        level_name=level_name(run.manifest),
    )
    return BlockStatus(row, attempts=0, committed=0, since=None, error=None)


def block_status(block: RunBlock) -> BlockStatus:
    """One block, from its files."""
    progress, manifest = Progress(), block.run.manifest
    for attempt in block.attempts:
        for event in read_events(block.attempt(attempt)):
            progress.take(event)
    state, attempts, committed = _state(block), _attempts(block), block.committed
    phase = Phase.DONE.value if committed >= block.steps else str(state.get("phase", Phase.PENDING.value))
    # it was done, and its last checkpoint was damaged since: it will train on from the one before
    damaged = phase == Phase.DONE.value and committed < block.steps
    phase = Phase.LOST.value if damaged else phase
    row = Row(
        name=block.name,
        layers=block.identity.layers,
        levels=block.identity.edges,
        phase=phase,
        step=committed if damaged else max(progress.step, committed),
        steps=block.steps,
        loss=progress.loss,
        rate=progress.rate,
        seconds=progress.seconds,
        memory=progress.memory,
        restarts=max(0, attempts - 1),
        level_name=level_name(manifest),
        validation=progress.validation,
    )
    since = time.time() - float(state["since"]) if "since" in state else None
    error = state.get("error") if phase != Phase.DONE.value else None
    if damaged:
        error = f"its last checkpoint is damaged (dbtrain inspect names the file), and step {committed} counts"
    worker = progress.worker if phase == Phase.RUNNING.value else None
    return BlockStatus(row, attempts, committed, since, error, worker, _origin(block, committed))


def _origin(block: RunBlock, committed: int) -> str:
    """Where the newest commit was made; the place matters only once several train the run."""
    commit = block.checkpoints.newest_commit() if committed else None
    if commit is None or commit.step != committed or not commit.place:
        return ""
    return f" by attempt {commit.attempt} at {commit.place}"


def _attempts(block: RunBlock) -> int:
    """Counted from their placement on: one that died in its start has told nothing."""
    try:
        placed = block.placed
    except ShardError:
        placed = 0
    return max([placed, *block.attempts])


def _state(block: RunBlock) -> dict[str, Any]:
    if not block.store.exists(STATE):
        return {}
    try:
        state = block.store.read_json(STATE)
    except ShardError:
        return {}
    return state if isinstance(state, dict) else {}
