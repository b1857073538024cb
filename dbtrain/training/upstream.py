"""Weights that a block takes, frozen, from those before it: greedy layer-wise training only."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.errors import ShardError
from dbtrain.method.split import local_name
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.fit import check_fit
from dbtrain.shards.manifest import plan_identity
from dbtrain.shards.storage.store import Store


def finished(run: Store, manifest: Mapping[str, Any], block: int) -> dict[str, Tensor]:
    """Weights at a block's last step by global name, averaged ones if there are, as a merge would take them.

    Raises:
        ShardError: the block is not at its last step, or its checkpoint is damaged.
    """
    steps = manifest["config"]["training"]["steps"]
    loaded = Checkpoints(run.child("blocks", f"{block:02d}"), plan_identity(manifest, block)).newest(
        roles=("ema", "model")
    )
    if loaded is None or loaded.step < steps:
        at = loaded.step if loaded else 0
        raise ShardError(f"block {block} of {run.url} is at step {at} of {steps}: the blocks after it need it finished")
    return loaded.parts.get("ema") or loaded.parts["model"]


@torch.no_grad()
def load_upstream(model: nn.Module, run: Store, manifest: Mapping[str, Any], sources: range) -> None:
    """Fill a model's frozen parameters from the shards of these blocks.

    Raises:
        ShardError: one of the blocks is not finished or its checkpoint damaged.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    found: dict[str, Tensor] = {}
    for block in sources:
        found |= {local_name(block, name): tensor for name, tensor in finished(run, manifest, block).items()}
    own = {name: tensor for name, tensor in found.items() if name in frozen}
    # otherwise a tensor of one element would fill a parameter of any shape
    check_fit(own, frozen, frozenset(frozen), sources[-1], f"{run.url}/blocks (those up to block {sources[-1]})")
    for name, parameter in frozen.items():
        parameter.copy_(own[name])
