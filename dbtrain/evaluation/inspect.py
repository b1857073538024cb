"""The inspect command: what a file or directory holds, verified."""

import posixpath
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from torch import Tensor

from dbtrain.errors import ShardError
from dbtrain.evaluation.loading import check_shard, merged_plan
from dbtrain.run.run import Run, RunBlock
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.format import Shard, decode
from dbtrain.shards.frozen import FROZEN, frozen_hash_of
from dbtrain.shards.manifest import MANIFEST
from dbtrain.shards.merged_directory import CONFIG, MergedDirectory
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.layout import say, show_table


def inspect_path(path: str, console: Console) -> None:
    """Print a shard's header and tensors, a run's commits, or a merged model's shards.

    Raises:
        ShardError: it is none of these, or damaged.
    """
    if path.endswith(".safetensors"):
        folder, name = posixpath.split(path)
        if name == FROZEN:
            _frozen(Store(folder or "."), console)
        else:
            _shard(Store(folder or "."), name, console)
        return
    store = Store(path)
    if not store.exists(CONFIG):
        check_run_path(store)
    if store.exists(MANIFEST):
        _run(Run(store), console)
    elif store.exists(CONFIG):
        _merged(store, console)
    else:
        raise ShardError(
            f"{path} is no shard, run or merged model: give a .safetensors file, out/name or the directory of a run"
        )


def _shard(store: Store, name: str, console: Console) -> None:
    with store.reading(name) as file:
        shard = decode(file, where=store.where(name))
    for line in _identity(shard):
        say(console, line)
    _tensors(shard.tensors, console)
    refuse_non_finite(shard.tensors, store.where(name))


def _frozen(store: Store, console: Console) -> None:
    """The parts of a run, or of a merged model, that no block trains."""
    tensors = MergedDirectory(store).frozen() if store.exists(CONFIG) else Run(store).frozen
    say(console, f"frozen parts of all blocks, {frozen_hash_of(tensors)}")
    _tensors(tensors, console)


def _tensors(tensors: Mapping[str, Tensor], console: Console) -> None:
    table = Table("tensor", "shape", "type")
    for name, tensor in tensors.items():
        table.add_row(name, "x".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype).removeprefix("torch."))
    show_table(console, table)


def _identity(shard: Shard) -> list[str]:
    """Lines on what a shard is; its noise levels are also given exactly, as the hex floats in the file."""
    of, (low, high) = shard.identity, shard.identity.edges
    return [
        f"run {of.run}, block {of.block} of {of.blocks}, step {shard.step}, {shard.role}",
        f"layers {of.layers[0]}-{of.layers[1] - 1}, noise levels {low:.6g} to {high:.6g} (exactly "
        f"{of.levels[0]} to {of.levels[1]})",
        f"architecture {of.architecture_hash}, data {of.data_hash or 'unknown'}",
        f"codebook {of.codebook_hash or 'none'}",
        *([f"frozen parts {of.frozen_hash}"] if of.frozen_hash else []),
    ]


def _run(run: Run, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in run.manifest.versions.items())
    say(console, f"run {run.manifest.name}, configuration {run.manifest.config_hash}, {versions}")
    for line in run.manifest.init.lines() if run.manifest.init else ():
        say(console, f"init: {line}")
    if run.frozen:
        say(console, f"frozen parts of all blocks, {run.manifest.frozen_hash}: whole")
    table = Table("block", "step", "verified")
    verified = {block.number: _verified(block) for block in run.blocks}
    for number, steps in verified.items():
        for step, wrong in steps.items():
            table.add_row(str(number), str(step), wrong or "whole")
    show_table(console, table)
    _refuse_damaged(run, verified)


def _verified(block: RunBlock) -> dict[int, str]:
    """What is wrong with each checkpoint of a block, '' where nothing is."""
    checkpoints = block.checkpoints
    return {step: "; ".join(checkpoints.verify(step)) or _misfit(block, step) for step in checkpoints.steps()}


def _refuse_damaged(run: Run, verified: Mapping[int, Mapping[int, str]]) -> None:
    """Say how to go on where checkpoints are damaged.

    Args:
        verified: by block, what is wrong with each of its checkpoints.

    Raises:
        ShardError: one is damaged.
    """
    damaged = sum(bool(wrong) for steps in verified.values() for wrong in steps.values())
    if not damaged:
        return
    lost = [str(block) for block, steps in verified.items() if steps and all(steps.values())]
    advice = "or let dbtrain resume train their blocks on from the ones before"
    if lost:
        advice = (
            f"for of block(s) {', '.join(lost)} no other is whole; without a copy dbtrain train {run.store.url} "
            "cluster.restart_damaged=true trains them again from their first step"
        )
    raise ShardError(f"{damaged} checkpoint(s) of {run.store.url} are damaged: restore copies of them, {advice}")


def _misfit(block: RunBlock, step: int) -> str:
    """What does not fit the model in a checkpoint whose bytes verify; '' if everything fits."""
    run_plan = block.run.plan
    wanted = run_plan.model(block.number, "meta").state_dict()
    try:
        for role, tensors in block.checkpoints.load(step, roles=None).parts.items():
            if role != "optim":
                check_shard(run_plan, block.number, tensors, wanted, f"its {role}")
    except ShardError as error:
        return str(error)
    return ""


def _merged(store: Store, console: Console) -> None:
    merged = MergedDirectory(store)
    run_plan = merged_plan(merged)
    if merged.progress:
        say(console, f"not done: {merged.progress}")
    table = Table("block", "step", "weights", "tensors", "file")
    for row in merged.blocks:
        tensors, wanted = merged.block(row.block), run_plan.model(row.block, "meta").state_dict()
        check_shard(run_plan, row.block, tensors, wanted, merged.where(row.block))
        steps = merged.manifest.steps(row.block)
        step = f"{row.step} of {steps}" if row.step < steps else str(row.step)
        table.add_row(str(row.block), step, row.role, str(len(tensors)), row.file)
    show_table(console, table)
