"""The inspect command: what a file or directory holds, verified."""

import posixpath

from rich.console import Console
from rich.table import Table

from dbtrain.errors import ShardError
from dbtrain.evaluation.merged_model import check_shard, shard_files
from dbtrain.run.plan import RunPlan, read_codebook, read_plan
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.fit import refuse_non_finite
from dbtrain.shards.format import Shard, decode
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.merged_directory import load_block, load_codebook, read_config
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
        _shard(Store(folder or "."), name, console)
        return
    store = Store(path)
    if not store.exists("config.json"):
        check_run_path(store)
    if store.exists("run.json"):
        _run(store, console)
    elif store.exists("config.json"):
        _merged(store, console)
    else:
        raise ShardError(
            f"{path} is no shard, run or merged model: give a .safetensors file, out/name or the directory of a run"
        )


def _shard(store: Store, name: str, console: Console) -> None:
    shard = decode(store.read(name), where=store.where(name))
    for line in _identity(shard):
        say(console, line)
    table = Table("tensor", "shape", "type")
    for tensor_name, tensor in shard.tensors.items():
        table.add_row(
            tensor_name, "x".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype).removeprefix("torch.")
        )
    show_table(console, table)
    refuse_non_finite(shard.tensors, store.where(name))


def _identity(shard: Shard) -> list[str]:
    """What a shard is; of its noise range the exact ends too, which are hex floats in the file."""
    of, (low, high) = shard.identity, shard.identity.sigmas
    return [
        f"run {of.run}, block {of.block} of {of.blocks}, step {shard.step}, {shard.role}",
        f"layers {of.layers[0]}-{of.layers[1] - 1}, noise levels {low:.6g} to {high:.6g} (exactly "
        f"{of.sigma_range[0]} to {of.sigma_range[1]})",
        f"configuration {of.config_hash}",
        f"codebook {of.codebook_hash or 'none'}",
    ]


def _run(store: Store, console: Console) -> None:
    manifest = read_manifest(store)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    say(console, f"run {manifest['config']['name']}, configuration {manifest['config_hash']}, {versions}")
    run_plan = read_plan(manifest, read_codebook(store, manifest))
    table, damaged = Table("block", "step", "verified"), 0
    for block in range(len(manifest["plan"])):
        checkpoints = Checkpoints(store.child("blocks", f"{block:02d}"), plan_identity(manifest, block))
        for step in checkpoints.steps():
            wrong = "; ".join(checkpoints.verify(step)) or _misfit(run_plan, checkpoints, block, step)
            table.add_row(str(block), str(step), wrong or "whole")
            damaged += bool(wrong)
    show_table(console, table)
    if damaged:
        raise ShardError(
            f"{damaged} checkpoint(s) of {store.url} are damaged: restore copies of them, or let dbtrain resume train "
            "their blocks on from the ones before"
        )


def _misfit(run_plan: RunPlan, checkpoints: Checkpoints, block: int, step: int) -> str:
    """What of a checkpoint whose bytes verify does not fit the model, '' if all does."""
    wanted = run_plan.model(block, "meta").state_dict()
    try:
        for role, tensors in checkpoints.load(step, roles=None).parts.items():
            if role != "optim":
                check_shard(run_plan, block, tensors, wanted, f"its {role}")
    except ShardError as error:
        return str(error)
    return ""


def _merged(store: Store, console: Console) -> None:
    config = read_config(store)
    run_plan = read_plan(config, load_codebook(store))
    table = Table("block", "step", "weights", "tensors", "file")
    for row in config["blocks"]:
        block, tensors = row["block"], load_block(store, row["block"])
        check_shard(
            run_plan, block, tensors, run_plan.model(block, "meta").state_dict(), shard_files(store, run_plan)(block)
        )
        table.add_row(str(row["block"]), str(row["step"]), row["role"], str(len(tensors)), row["file"])
    show_table(console, table)
