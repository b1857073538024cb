"""A block's model from the shards that hold it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dbtrain.evaluation.blocks import AllBlocks
from dbtrain.method.interface import BlockModel
from dbtrain.method.split import local_name
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.shards.fit import check_fit
from dbtrain.shards.merged_directory import MergedDirectory

LoadBlock = Callable[[int], dict[str, Tensor]]
Where = Callable[[int], str]
"""The file that holds a block's tensors, for messages."""


def somewhere(block: int) -> str:
    """What messages call a file that is none."""
    return f"the shard of block {block}"


def load_model(run_plan: RunPlan, block: int, load: LoadBlock, where: Where = somewhere) -> BlockModel:
    """A block's model from the shards that hold it, whose tensors are named as in the whole model.

    Raises:
        ShardError: a tensor is missing, has another shape or type, or is none of the model's.
    """
    sources = run_plan.scheme.sources(block)
    model = run_plan.model(sources[-1])
    state: dict[str, Tensor] = {name: t for name, t in model.state_dict().items() if name in run_plan.frozen}
    for shard in sources:
        # where several shards hold a name, such as a head's, the last one is the block's own
        state |= check_shard(run_plan, shard, load(shard), model.state_dict(), where(shard))
    model.load_state_dict(state, strict=True)
    return model.eval()


def check_shard(
    run_plan: RunPlan, shard: int, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Tensors of a shard by their names in its model, of which `wanted` is the state;
    ShardError if they misfit it."""
    wanted = {name: tensor for name, tensor in wanted.items() if name not in run_plan.frozen}
    named = {local_name(shard, name): tensor for name, tensor in tensors.items()}
    layers = run_plan.shards.layers(shard)
    # in greedy training, the stem belongs to the first block, and earlier layers to the earlier blocks
    borrows = run_plan.scheme.in_turn and shard > 0

    def holds(name: str) -> bool:
        group, number = name.split(".", 2)[:2]
        return int(number) in layers if group == "layers" else not (borrows and group == "stem")

    required = frozenset(filter(holds, wanted))
    check_fit(named, wanted, required, shard, where)
    return named


def merged_plan(merged: MergedDirectory) -> RunPlan:
    """The plan of a merged model, with what its blocks have in common.

    Raises:
        ShardError: its files are damaged.
    """
    return read_plan(merged.manifest, merged.codebook(), merged.frozen())


def all_blocks(run_plan: RunPlan, load: LoadBlock, device: torch.device, where: Where = somewhere) -> AllBlocks:
    """The models of all blocks; those of the same shards are one."""
    models: dict[range, BlockModel] = {}
    for block in range(run_plan.split.blocks):
        sources = run_plan.scheme.sources(block)
        if sources not in models:
            models[sources] = load_model(run_plan, block, load, where).to(device)
    blocks = [models[run_plan.scheme.sources(block)] for block in range(run_plan.split.blocks)]
    return AllBlocks(blocks, device)
