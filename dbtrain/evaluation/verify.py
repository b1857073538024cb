"""Merge a run and prove that the merged model is the blocks."""

from collections.abc import Mapping
from typing import Any

import torch

from dbtrain.errors import IncompleteRunError, ShardError
from dbtrain.evaluation.merged_model import MergedModel, verify
from dbtrain.method.interface import Batch
from dbtrain.run.plan import RunPlan, read_codebook, read_plan
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.commit import step_name
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.merge import MergeResult, merge
from dbtrain.shards.merged_directory import read_config
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store

SAMPLES = 32
CPU = torch.device("cpu")


def merge_and_verify(run: Store) -> tuple[MergeResult, int]:
    """Merge, and compare every block's output with that of its own checkpoint on a few test samples.

    A merged model exists only when this has succeeded; one of before stays until then.

    Returns:
        The result of the merge, and on how many samples it was verified.

    Raises:
        IncompleteRunError: blocks are not finished.
        ShardError: a shard is damaged, foreign or not of this model, or an output differs or is not finite.
        DataError: the test samples cannot be read.
    """
    check_run_path(run)
    manifest = read_manifest(run)
    _check_finished(run, manifest)
    run_plan = read_plan(manifest, read_codebook(run, manifest))
    test = run_plan.data().test
    samples = min(SAMPLES, len(test))
    batch = test.batch(torch.arange(samples), CPU)
    result = merge(run, lambda merged: _check(run, manifest, run_plan, merged, batch))
    return result, samples


def _check(run: Store, manifest: Mapping[str, Any], run_plan: RunPlan, merged: Store, batch: Batch) -> None:
    rows = read_config(merged)["blocks"]

    def own(block: int) -> dict[str, torch.Tensor]:
        role = rows[block]["role"]
        checkpoints = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block))
        return checkpoints.load(rows[block]["step"], (role,)).parts[role]

    def where(block: int) -> str:
        step = step_name(rows[block]["step"])
        return run.where(f"blocks/{block:02d}/{step}/{rows[block]['role']}.safetensors")

    # first the checkpoints, which the user can do something about
    apart = MergedModel(run_plan, own, CPU, where)
    wrong = verify(MergedModel.read(merged, CPU), apart, batch)
    if wrong:
        raise ShardError(
            f"{run.url} is not merged, since the blocks do not pass the check: {'; '.join(wrong)}. A block that "
            "computes NaN or infinity was trained into it: lower training.optimizer.lr, or set "
            "training.optimizer.clip, in a run of another name. A block that differs from its checkpoint had its files "
            "changed meanwhile, or the storage gives back wrong bytes: check it (dbtrain inspect), then merge again"
        )


def _check_finished(run: Store, manifest: dict[str, Any]) -> None:
    """Raise IncompleteRunError, naming each, if blocks have not reached their last step."""
    total, behind = manifest["config"]["training"]["steps"], []
    for block in range(len(manifest["plan"])):
        steps = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block)).steps()
        if not steps or steps[-1] < total:
            behind.append(f"block {block} at step {steps[-1] if steps else 0} of {total}")
    if behind:
        raise IncompleteRunError(f"{run.url} is not finished: {', '.join(behind)}; run dbtrain train again first")
