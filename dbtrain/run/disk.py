"""How much disk a run takes at its peak and after, and how much host memory its snapshots."""

import os
import shutil
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dbtrain.run.cost import FLOAT_BYTES, count_parameters
from dbtrain.run.plan import RunPlan
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.console import size

ADAM_STATES = 2
"""States that AdamW has for each parameter; Muon has one for each matrix of the layers, so that it needs less
than is said here."""
SNAPSHOTS = 2
"""Snapshots in host memory at once: one is written while the next one is taken."""


@dataclass(frozen=True)
class BlockDisk:
    """Bytes of one block."""

    checkpoint: int
    """One checkpoint in training, which is also what a snapshot of it takes in host memory."""
    training: int
    """The most while it trains: the checkpoints that are kept and the one that is being written."""
    done: int
    """What is left when the block is done."""


def of_block(run_plan: RunPlan, block: int) -> BlockDisk:
    """What a block's checkpoints take: full float32 tensors, whatever the precision and the ZeRO stage."""
    training = run_plan.config.training.of_block(block)
    weights = count_parameters(run_plan.objective(block, "meta")) * FLOAT_BYTES
    kept = weights * (2 if training.ema else 1)
    checkpoint = kept + ADAM_STATES * weights
    count = training.keep + (run_plan.schedule(block).held is not None)
    done = count * checkpoint if training.keep_optimizer else kept
    return BlockDisk(checkpoint, (count + 1) * checkpoint, done)


def _of_blocks(run_plan: RunPlan, numbers: Iterable[int]) -> list[BlockDisk]:
    """Bytes of each block in turn; of blocks that are alike only one is looked at."""
    known: dict[Hashable, BlockDisk] = {}
    found = []
    for block in numbers:
        shape = run_plan.shape_of(block)
        if shape not in known:
            known[shape] = of_block(run_plan, block)
        found.append(known[shape])
    return found


def peak_and_after(blocks: Sequence[BlockDisk], at_once: int) -> tuple[int, int]:
    """Bytes of all blocks when so many train at the same time and the others are done, and when all are."""
    after = sum(block.done for block in blocks)
    more = sorted((block.training - block.done for block in blocks), reverse=True)
    return after + sum(more[:at_once]), after


def needs(run_plan: RunPlan, run: Store, at_once: int) -> list[str]:
    """Lines for a plan: the disk at its peak and after,
    host memory for snapshots, and whether it is too little.

    Args:
        run_plan: plan of the run.
        run: its directory; it need not exist.
        at_once: blocks that train at the same time.
    """
    blocks = _of_blocks(run_plan, range(run_plan.shards.blocks))
    peak, after = peak_and_after(blocks, at_once)
    largest = max(block.checkpoint for block in blocks)
    disk = f"disk: at most {size(peak)} while {at_once} block(s) train, {size(after)} when all are done"
    free = _free(run)
    if free is not None:
        disk += f"; {size(free)} are free at {run.url}"
    memory = f"host memory of a block's first worker for snapshots: up to {SNAPSHOTS} of {size(largest)} each"
    return [disk, memory, *shortage(run_plan, run, at_once)]


def shortage(run_plan: RunPlan, run: Store, at_once: int, only: Collection[int] | None = None) -> list[str]:
    """One line if a local disk has too little room for what a run still needs; none if it has enough.

    With `only`, these blocks alone are trained here.
    """
    numbers = [block for block in range(run_plan.shards.blocks) if only is None or block in only]
    blocks = _of_blocks(run_plan, numbers)
    peak, _ = peak_and_after(blocks, at_once)
    free = _free(run)
    if free is None or free + (held := _held(run.path)) >= peak:
        return []
    drop = ", set training.keep_optimizer=false" if run_plan.config.training.keep_optimizer else ""
    return [
        f"the disk is too small: training may need {size(peak - held)} more at {run.url}, and {size(free)} are free; "
        f"free space{drop}, or choose another out="
    ]


def _free(run: Store) -> int | None:
    """Free bytes where a run lies or will lie; None for an object store."""
    if not run.is_local:
        return None
    path = next(folder for folder in (run.path, *run.path.parents) if folder.is_dir())
    return shutil.disk_usage(path).free


def _held(run: Path) -> int:
    """Bytes of the run's files that are there already; a file with two names counts once."""
    found = {}
    for folder, _, names in os.walk(run):
        for name in names:
            try:
                state = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # removed meanwhile
                continue
            found[state.st_ino] = state.st_size
    return sum(found.values())
