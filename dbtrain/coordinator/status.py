"""What a run is doing, from its files alone."""

import time
from dataclasses import dataclass, replace
from typing import Any

from dbtrain.coordinator.lifecycle import FINAL, Phase
from dbtrain.coordinator.progress import Progress
from dbtrain.errors import ShardError
from dbtrain.run.plan import level_name
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.storage.fence import newest_attempt
from dbtrain.shards.storage.lock import holder_of, is_held
from dbtrain.shards.storage.store import Store
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
    """Process and host of the first rank, while the block trains."""


def preparation(run: Store) -> str | None:
    """What a command does that works on a run and has not written its run.json yet, in words; None otherwise.

    Raises:
        ShardError: the storage cannot be reached.
    """
    holder = None if run.exists("run.json") else holder_of(run)
    if holder is None:
        return None
    return (
        f"{run.url} is being prepared by pid {holder.pid} on {holder.host}: its data are read, and a pilot may "
        "calibrate its range; there is no block yet"
    )


def status(run: Store) -> list[BlockStatus]:
    """Every block of a run, running or not.

    Raises:
        ShardError: it is no run, or its manifest is damaged.
    """
    manifest = read_manifest(run)
    found = [_block(run, manifest, block) for block in range(len(manifest["plan"]))]
    # after the blocks: a command that ends meanwhile has written their last states before it gives the lock back
    return found if is_held(run) else [_without_command(status) for status in found]


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


def _block(run: Store, manifest: dict[str, Any], block: int) -> BlockStatus:
    store = run.child("blocks", f"{block:02d}")
    identity = plan_identity(manifest, block)
    checkpoints = Checkpoints(store, identity)
    told = sorted(int(name) for name in store.child("attempts").list() if name.isdigit())
    progress = Progress()
    for attempt in told:
        for event in read_events(store.child("attempts", str(attempt))):
            progress.take(event)
    steps = checkpoints.steps()
    committed = steps[-1] if steps else 0
    total = int(manifest["config"]["training"]["steps"])
    state = _state(store)
    attempts = _attempts(store, told)
    phase = "done" if committed >= total else str(state.get("phase", "pending"))
    low, high = (float.fromhex(edge) for edge in identity.sigma_range)
    row = Row(
        block=block,
        layers=identity.layers,
        levels=(low, high),
        phase=phase,
        step=max(progress.step, committed),
        steps=total,
        loss=progress.loss,
        rate=progress.rate,
        seconds=progress.seconds,
        memory=progress.memory,
        restarts=max(0, attempts - 1),
        level_name=level_name(manifest),
    )
    since = time.time() - float(state["since"]) if "since" in state else None
    error = state.get("error") if phase != "done" else None
    return BlockStatus(row, attempts, committed, since, error, progress.worker if phase == "running" else None)


def _attempts(store: Store, told: list[int]) -> int:
    """Counted from their placement on: one that died in its start has told nothing."""
    try:
        placed = newest_attempt(store)
    except ShardError:
        placed = 0
    return max([placed, *told])


def _state(store: Store) -> dict[str, Any]:
    if not store.exists("state.json"):
        return {}
    try:
        state = store.read_json("state.json")
    except ShardError:
        return {}
    return state if isinstance(state, dict) else {}
