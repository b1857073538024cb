"""Opening a merged model, of a directory or a run, with its blocks where the configuration wants them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from dbtrain.config import Config
from dbtrain.config.evaluation import Resident
from dbtrain.evaluation.blocks import Blocks
from dbtrain.evaluation.loading import all_blocks, merged_plan
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.pipeline.blocks import PlacedBlocks
from dbtrain.evaluation.pipeline.places import OpenHosts
from dbtrain.evaluation.residency import Residency, ResidentBlocks, choose
from dbtrain.evaluation.transfer import transfer_to
from dbtrain.run.newest import newest_model
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.run.run import Run
from dbtrain.shards.manifest import Manifest, read_manifest
from dbtrain.shards.merged_directory import CONFIG, MergedDirectory, unfinished
from dbtrain.shards.storage.directory import check_run_path


def read_merged_model(
    merged: MergedDirectory, device: torch.device, residency: Residency = "all", run_plan: RunPlan | None = None
) -> MergedModel:
    """The model of a merged directory, every file verified by its hash.

    Args:
        merged: the directory.
        device: where the blocks are put.
        residency: which blocks are in memory.
        run_plan: plan of the run, if not as the directory has it.

    Raises:
        ShardError: something is missing or damaged; if not all blocks are in memory, not before one is
            asked for.
    """
    run_plan = run_plan or merged_plan(merged)
    blocks: Blocks
    if residency == "all":
        blocks = all_blocks(run_plan, merged.block, device, merged.where)
    else:
        transfer = transfer_to(device)
        load = partial(merged.block, to=transfer.destination)
        blocks = ResidentBlocks(run_plan, load, device, merged.where, residency == "ahead", transfer)
    return MergedModel(run_plan, blocks, device)


def open_merged_model(
    merged: MergedDirectory,
    device: torch.device,
    run_plan: RunPlan,
    resident: Resident,
    hosts: OpenHosts | None = None,
) -> MergedModel:
    """The same, with those blocks in memory that a section `evaluation` wants there,
    or in processes of a cluster.

    Close it, or use it in a ``with`` statement. Without `hosts` a pipeline is taken as `auto`.

    Raises:
        ShardError: the files are damaged.
        PlacementError: the cluster of a pipeline does not answer, or has no room.
    """
    if resident != "pipeline" or hosts is None:
        here: Literal["auto", "all", "one"] = "auto" if resident == "pipeline" else resident
        return read_merged_model(merged, device, choose(here, run_plan, merged, device), run_plan)
    cluster = hosts(run_plan.config)
    try:
        return MergedModel(run_plan, PlacedBlocks(run_plan, merged.store.url, cluster, device), device)
    except BaseException:
        cluster.close()
        raise


def open_run(
    run: Run,
    device: torch.device,
    merged: MergedDirectory | None = None,
    changed: Callable[[Config], Config] = lambda config: config,
    hosts: OpenHosts | None = None,
) -> MergedModel:
    """The merged model of a run, with the places that only run.json keeps,
    if it is there, such as its data's. `evaluation.resident` says which of its blocks are in memory.

    Close it, or use it in a ``with`` statement.

    Args:
        run: the run.
        device: device of the blocks.
        merged: a model of its blocks that lies elsewhere.
        changed: the configuration to use, from that of the run.
        hosts: connects to the cluster that a pipeline is in; without it, a pipeline is taken as `auto`.

    Raises:
        ShardError: the run is not merged, or its files are damaged.
        ConfigError: what `changed` raises.
        PlacementError: the cluster of a pipeline does not answer, or has no room.
    """
    merged = merged or merged_of(run)
    run_plan = merged_plan(merged)
    if run.exists and _same_run(run.manifest, merged.manifest):
        located = read_plan(run.manifest, None)
        run_plan = replace(run_plan, config=located.config, paths=located.paths)
    run_plan = replace(run_plan, config=changed(run_plan.config))
    model = open_merged_model(merged, device, run_plan, run_plan.config.evaluation.resident, hosts)
    model.progress, model.weights_hash = progress_of(run, merged), merged.weights_hash
    return model


def merged_of(run: Run) -> MergedDirectory:
    """The merged model of a run.

    Raises:
        ShardError: it is no run, and the message says what it is instead, or the run is not merged.
    """
    # a merged model is enough: it may have been carried here alone
    if not run.merged.exists(CONFIG):
        check_run_path(run.store)
        read_manifest(run.store)
    return MergedDirectory(run.merged)


@contextmanager
def model_of(run: Run, now: bool) -> Iterator[MergedDirectory]:
    """The merged model of a run; or, of a run that may be training, one of its newest commits.

    Raises:
        ShardError: there is none, or a block has no commit.
    """
    if not now:
        yield merged_of(run)
        return
    check_run_path(run.store)
    with newest_model(run) as merged:
        yield merged


def progress_of(run: Run, merged: MergedDirectory) -> str:
    """How far the blocks were trained, if the run is longer than that; '' for the model of a whole run."""
    longest = run.manifest if run.exists and _same_run(run.manifest, merged.manifest) else merged.manifest
    return unfinished(longest, merged.blocks)


def _same_run(ours: Manifest, theirs: Manifest) -> bool:
    """Whether both are manifests of one run, which may have been extended in between."""
    count = ours.blocks
    return count == theirs.blocks and all(ours.identity(block) == theirs.identity(block) for block in range(count))
