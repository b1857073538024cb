"""Merge a run and prove that the merged model is the blocks."""

from typing import Any

import torch

from dbtrain.errors import IncompleteRunError, ShardError
from dbtrain.evaluation.merged import MergedModel, verify
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.merge import MergeResult, merge
from dbtrain.shards.merged import read_config
from dbtrain.shards.store import Store

SAMPLES = 32


def merge_and_verify(run: Store) -> tuple[MergeResult, int]:
    """Merge, then compare every block's output with that of its own checkpoint on a few test samples.

    Returns:
        The result of the merge, and on how many samples it was verified.

    Raises:
        IncompleteRunError: blocks are not finished.
        ShardError: something does not match.
    """
    manifest = read_manifest(run)
    _check_finished(run, manifest)
    result = merge(run)
    merged = run.child("merged")
    shards = read_config(merged)["blocks"]

    def own(block: int) -> dict[str, torch.Tensor]:
        row = shards[block]
        checkpoints = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block))
        role = row["role"]
        return checkpoints.load(row["step"], (role,)).parts[role]

    model = MergedModel.of_run(run, torch.device("cpu"))
    test = model.blueprint.data().test
    samples = min(SAMPLES, len(test))
    wrong = verify(model, own, test.batch(torch.arange(samples), model.device))
    if wrong:
        raise ShardError(f"the merged model in {merged.url} is not its blocks: {'; '.join(wrong)}; merge again")
    return result, samples


def _check_finished(run: Store, manifest: dict[str, Any]) -> None:
    """Raise IncompleteRunError, naming each, if blocks have not reached their last step."""
    total, behind = manifest["config"]["training"]["steps"], []
    for block in range(len(manifest["plan"])):
        steps = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block)).steps()
        if not steps or steps[-1] < total:
            behind.append(f"block {block} at step {steps[-1] if steps else 0} of {total}")
    if behind:
        raise IncompleteRunError(f"{run.url} is not finished: {', '.join(behind)}; run dbtrain train again first")
