"""Weights that a block takes, frozen, from those before it: greedy layer-wise training only."""

import sys

import torch
from torch import Tensor, nn

from dbtrain.errors import ShardError
from dbtrain.method.split import local_name
from dbtrain.run.run import Run, RunBlock
from dbtrain.shards.fit import check_fit


def finished(block: RunBlock) -> dict[str, Tensor]:
    """Weights at a block's last step by global name, averaged ones if there are, as a merge would take them.

    Raises:
        ShardError: the block is not at its last step, or its checkpoint is damaged.
    """
    found = block.newest_weights(lambda line: print(line, file=sys.stderr))
    step = 0 if found is None else found[0].step
    if found is None or step < block.steps:
        raise ShardError(
            f"block {block.number} of {block.run.store.url} is at step {step} of {block.steps}: the blocks after it "
            "need it finished"
        )
    loaded, role = found
    return loaded.parts[role]


@torch.no_grad()
def load_upstream(model: nn.Module, run: Run, sources: range) -> None:
    """Fill a model's frozen parameters from the shards of these blocks.

    Raises:
        ShardError: one of the blocks is not finished or its checkpoint damaged.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    found: dict[str, Tensor] = {}
    for block in sources:
        found |= {local_name(block, name): tensor for name, tensor in finished(run.block(block)).items()}
    own = {name: tensor for name, tensor in found.items() if name in frozen}
    # otherwise a tensor of one element would fill a parameter of any shape
    check_fit(own, frozen, frozenset(frozen), sources[-1], f"{run.store.url}/blocks (those up to block {sources[-1]})")
    for name, parameter in frozen.items():
        parameter.copy_(own[name])
