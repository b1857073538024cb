"""Merge a run and prove that the merged model computes what its blocks compute."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from dbtrain.config import Config
from dbtrain.errors import IncompleteRunError, ShardError
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.opening import read_merged_model
from dbtrain.evaluation.residency import ResidentBlocks
from dbtrain.method.interface import Batch
from dbtrain.run.merge import MergeResult, merge, on_standard_error
from dbtrain.run.newest import merge_newest
from dbtrain.run.run import WEIGHTS, Run
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store

SAMPLES = 32
CHECK_S = 120.0
"""About as long may the blocks compute; a model of billions of parameters is compared on fewer samples."""
CPU = torch.device("cpu")


def merge_and_verify(
    run: Run, config: Config | None = None, now: bool = False, tell: Callable[[str], None] = on_standard_error
) -> tuple[MergeResult, int]:
    """Merge, and compare every block's output with that of its own checkpoint on a few test samples.

    A merged model exists only after this has succeeded; an older one stays until then.

    Args:
        run: directory of the run.
        config: configuration of the run, with the data where it lies now; by default where run.json says.
        now: take blocks that are not done as far as they are, of a run that may be training.
        tell: gets a line for each damaged checkpoint that is passed over.

    Returns:
        The result of the merge, and on how many samples it was verified.

    Raises:
        IncompleteRunError: blocks are not finished.
        ShardError: a shard is damaged, foreign or not of this model, or an output differs or is not finite.
        DataError: the test samples cannot be read.
    """
    check_run_path(run.store)
    if not now:
        _check_finished(run)
    run_plan = run.plan if config is None else replace(run.plan, config=config)
    test = run_plan.data().test
    batch = test.batch(torch.arange(min(SAMPLES, len(test))), CPU)
    compared: list[int] = []

    def check(of: Run, merged: Store) -> None:
        compared.append(_check(of, MergedDirectory(merged), batch))

    result = merge_newest(run, check, tell) if now else merge(run, partial(check, run), tell=tell)
    return result, compared[-1]


def verify(merged: MergedModel, apart: MergedModel, batch: Batch) -> list[str]:
    """Compare each block from its own checkpoint with the same block of the merged model, bit for bit.

    Both are given what the block's own checkpoint is given along the chain,
    so that only a block that is wrong itself is named, not those after it.

    Args:
        apart: the blocks from their own checkpoints.
        batch: samples to run.

    Returns:
        One line for each evaluation whose output differs or is not finite.
    """
    draws = merged.draws(torch.arange(len(next(iter(batch.values())))))
    # read by the block's own checkpoint, so that a fault in that one is told first
    example = apart.example(batch)
    denoise = merged.denoiser(example.context)
    shape = (len(example.clean), *merged.run_plan.noise().level_shape(example))
    name = merged.run_plan.noise().level_name
    wrong: list[str] = []
    with torch.no_grad():
        for theirs in apart.evaluations(batch, draws):
            place = f"block {theirs.block} at {name} {theirs.level:g}"
            # the output itself may hold minus infinity: a masked language model excludes tokens by it
            if not theirs.denoised.isfinite().all():
                # later evaluations in the chain fail because of this block, not of their own weights
                return [*wrong, f"{place} computes values that are NaN or infinite, from its own checkpoint already"]
            level = torch.full(shape, theirs.level, dtype=torch.float32, device=merged.device)
            ours, _ = denoise(theirs.block, theirs.noisy, level)
            if not torch.equal(ours, theirs.output):
                wrong.append(f"{place} differs from its checkpoint")
    return wrong


def _affordable(model: MergedModel, batch: Batch) -> int:
    """How many of these samples two models can be compared on in `CHECK_S`, at least one."""
    one = {key: values[:1] for key, values in batch.items()}
    with torch.no_grad():
        for _ in range(2):  # the first time also reads the block, and makes memory and threads
            started = time.perf_counter()
            next(model.walk(one, model.draws(torch.arange(1))))
    seconds = 2 * len(model.blocks) * (time.perf_counter() - started)
    return max(1, min(len(next(iter(batch.values()))), int(CHECK_S / seconds)))


def _check(run: Run, merged: MergedDirectory, batch: Batch) -> int:
    """Raise ShardError if a block differs; else on how many of the samples that was looked at."""
    rows = merged.blocks

    def committed(block: int) -> dict[str, torch.Tensor]:
        row = rows[block]
        role = next(role for role in WEIGHTS if role == row.role)
        return run.block(block).checkpoints.load(row.step, (role,)).parts[role]

    def where(block: int) -> str:
        return run.store.where(run.block(block).shard(rows[block].step, rows[block].role))

    # one block at a time from each side, so that a model larger than the memory can be merged
    apart = MergedModel(run.plan, ResidentBlocks(run.plan, committed, CPU, where, ahead=False), CPU)
    samples = _affordable(apart, batch)
    few = {key: values[:samples] for key, values in batch.items()}
    wrong = verify(read_merged_model(merged, CPU, "alone"), apart, few)
    if wrong:
        raise ShardError(
            f"{run.store.url} is not merged, since the blocks do not pass the check: {'; '.join(wrong)}. A block that "
            "computes NaN or infinity was trained into it: lower training.optimizer.lr, or set "
            "training.optimizer.clip, in a run of another name. A block that differs from its checkpoint had its files "
            "changed meanwhile, or the storage gives back wrong bytes: check it (dbtrain inspect), then merge again"
        )
    return samples


def _check_finished(run: Run) -> None:
    """Raise IncompleteRunError, naming each, if blocks have not reached their last step."""
    # any commit counts here, verified or not: if the last one is damaged, the merge's own message says more
    reached = [(block, max(block.checkpoints.steps(), default=0)) for block in run.blocks]
    behind = [f"block {block.number} at step {step} of {block.steps}" for block, step in reached if step < block.steps]
    if behind:
        raise IncompleteRunError(
            f"{run.store.url} is not finished: {', '.join(behind)}; run dbtrain train again first, or merge what "
            "there is by now (--now)"
        )
