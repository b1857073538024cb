"""How the blocks of a run depend on each other: not at all, as in the paper, or as in one of the baselines.
Each method is one row of a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dbtrain.method.forward_forward import ForwardForward, ForwardForwardObjective
from dbtrain.method.interface import BlockModel
from dbtrain.method.objective import BlockObjective, JointObjective, Precision, Slice
from dbtrain.method.split import LayerSplit

BuildObjective = Callable[[BlockModel, Sequence[Slice], int, Precision], nn.Module]
"""(model of a shard, every block's slice, number of the shard, precision) -> module that returns a loss."""


@dataclass(frozen=True)
class Scheme:
    """One row of the table."""

    objective: BuildObjective
    target: Literal["noisy", "hidden", "baseline"] = "noisy"
    """What blocks see of the target: its noisy code; nothing;
    or what the architecture's end-to-end baseline sees."""
    shared: bool = False
    """Whether one job trains all blocks, into one shard."""
    cumulative: bool = False
    """Whether a block runs all layers up to its own last one, and not only its own."""
    in_turn: bool = False
    """Whether a block starts only when those before it are done, and takes their weights, frozen."""
    starts_random: bool = False
    """Whether its blocks cannot start from the weights of another model."""
    wrap: Callable[[BlockModel, Sequence[Sequence[int]]], BlockModel] | None = None
    """(model, every block's layers in order) -> model behind the same plug, if the plain one will not do."""

    def shards(self, split: LayerSplit) -> LayerSplit:
        """Layers of each shard."""
        return LayerSplit((split.bounds[0], split.bounds[-1])) if self.shared else split

    def runs(self, split: LayerSplit, block: int) -> range:
        """Layers that one evaluation of a block takes, each of them once."""
        own = split.layers(block)
        return range(own.stop) if self.cumulative else own

    def sources(self, block: int) -> range:
        """Shards that together hold the model of a block."""
        if self.shared:
            return range(1)
        return range(block + 1) if self.in_turn else range(block, block + 1)


def _one_block(model: BlockModel, slices: Sequence[Slice], shard: int, precision: Precision) -> nn.Module:
    own = slices[shard]
    return BlockObjective(model, own.layers, own.low, own.high, precision)


def _all_blocks(model: BlockModel, slices: Sequence[Slice], shard: int, precision: Precision) -> nn.Module:
    return JointObjective(model, slices, precision)


def _on_frozen_features(model: BlockModel, slices: Sequence[Slice], shard: int, precision: Precision) -> nn.Module:
    """Train the layers that no earlier block has, and the head; only block 0 trains the stem too."""
    learned = max(slices[shard - 1].layers) + 1 if shard else 0
    for name, parameter in model.named_parameters():
        group, _, rest = name.partition(".")
        frozen = group == "stem" or (group == "layers" and int(rest.split(".", 1)[0]) < learned)
        parameter.requires_grad_(not (shard and frozen))
    return _one_block(model, slices, shard, precision)


def _forward_forward(model: BlockModel, slices: Sequence[Slice], shard: int, precision: Precision) -> nn.Module:
    assert isinstance(model, ForwardForward)  # what `wrap` makes
    return ForwardForwardObjective(model, precision)


SCHEMES: Mapping[str, Scheme] = {
    "diffusion_blocks": Scheme(_one_block),
    "end_to_end": Scheme(_one_block, target="baseline"),
    # independent shallow networks; their mean prediction is an ensemble
    "ensemble": Scheme(_one_block, target="hidden"),
    # one stem and one head for all blocks, in one process
    "joint": Scheme(_all_blocks, shared=True),
    # Bengio et al. 2006; Belilovsky et al. 2019: each block on frozen features, with its own classifier
    "greedy": Scheme(_on_frozen_features, target="hidden", cumulative=True, in_turn=True, starts_random=True),
    "forward_forward": Scheme(
        _forward_forward, target="hidden", shared=True, cumulative=True, starts_random=True, wrap=ForwardForward
    ),
}
"""Rows by the name that `method` has in the configuration."""
