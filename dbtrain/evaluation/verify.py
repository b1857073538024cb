"""Merge a run and prove that the merged model is the blocks."""

import torch

from dbtrain.errors import ShardError
from dbtrain.evaluation.merged import MergedModel, verify
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import plan_identity, read_manifest
from dbtrain.shards.merge import MergeResult, merge, read_config
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
    result = merge(run)
    merged = run.child("merged")
    shards, manifest = read_config(merged)["shards"], read_manifest(run)

    def own(block: int) -> dict[str, torch.Tensor]:
        row = shards[block]
        checkpoints = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block))
        role = row["weights"]
        return checkpoints.load(row["step"], (role,)).parts[role]

    model = MergedModel.read(merged, torch.device("cpu"))
    test = model.blueprint.data().test
    samples = min(SAMPLES, len(test))
    wrong = verify(model, own, test.batch(torch.arange(samples), model.device))
    if wrong:
        raise ShardError(f"the merged model in {merged.url} is not its blocks: {'; '.join(wrong)}; merge again")
    return result, samples
