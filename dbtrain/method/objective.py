"""The loss of one block: draw a level in its slice, corrupt the target, run its layers, and compare.

It is the mean of noise.weight(level) * model.loss(output, target). Levels are drawn from the slice as it is
widened by `noise.overlap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, BlockModel, Example

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Slice:
    """What one block trains: its layers, and levels from `low` to `high`, overlap included."""

    layers: Sequence[int]
    """Numbers of the layers that are applied, in order."""
    low: float
    high: float
    share: float = 1.0
    """Share of all training levels in the block's own slice, without overlap.
    `JointObjective` divides it by the sum over the blocks."""


class BlockObjective(nn.Module):
    """A block and its slice as one module: batch in, mean weighted loss out  # paper, eq. (6).

    Args:
        model: holds the layers of this block only (or all of them, for the end-to-end baseline).
        layers: numbers of those layers in the whole model, in the order in which they are applied; a looped
            one is there more than once.
        low, high: the levels trained, overlap included.
        precision: `bf16` runs the network under autocast; levels, noise and loss stay in float32.
    """

    def __init__(self, model: BlockModel, layers: Sequence[int], low: float, high: float, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        edges = torch.tensor([low, high], dtype=torch.float64)
        self.q_low, self.q_high = model.noise.cdf(edges).tolist()
        self.precision = precision

    def forward(self, batch: Batch, key: Tensor, positions: Tensor) -> Tensor:
        """Mean of weight times loss over the N samples (and their positions), a float32 scalar.

        Args:
            batch: N samples.
            key: int64 scalar, the seed of this (run, block, step).
            positions: (N,) positions in the effective batch, from which each sample's noise is drawn.
        """
        model = self.model
        example, noisy, level = self._noisy(batch, Draws(key, positions))
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = model.predict_loss(self.layers, noisy, level, example.context, example.target)
        return (model.noise.weight(level) * loss).mean()

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the module as any other, but leave the draws out: noise is then the same with and without
        compilation, and Triton refuses the 64-bit constants of the draws."""
        self.keep_draws_eager()
        self.model.compile_parts()
        super().compile(*arguments, **options)

    def keep_draws_eager(self) -> None:
        """Leave the draws out of any compiled graph. A decorator would do the same, but would import the
        compiler, which takes 1.5 s, wherever this module is imported."""
        self.__dict__["_noisy"] = torch.compiler.disable(self._noisy)  # type: ignore[no-untyped-call]

    def _noisy(self, batch: Batch, draws: Draws) -> tuple[Example, Tensor, Tensor]:
        model = self.model
        example = model.example(batch, draws)
        uniform = model.noise.draw_uniforms(example, draws)
        level = model.noise.quantile(self.q_low + uniform * (self.q_high - self.q_low))
        return example, model.noise.corrupt(example.clean, level, draws), level


class JointObjective(nn.Module):
    """All blocks in one process, with one stem and one head: the mean of their losses on the same batch.

    A block's loss is weighted by the share of the training levels in its own slice, as it would be in one
    network over the whole range. The shares are equal under every policy but `alpha` and `explicit`. The
    authors' released code draws one block a step. Here every step trains all blocks: DeepSpeed replaces
    missing gradients by zeros, with which Adam would still move the layers of blocks that were not drawn.

    Args:
        model: holds all layers.
        slices: what each block trains, in the order of the blocks.
        precision: the same as in :class:`BlockObjective`.
    """

    def __init__(self, model: BlockModel, slices: Sequence[Slice], precision: Precision) -> None:
        super().__init__()
        self.model = model
        # parts in a tuple are not registered as submodules, which would list the model's parameters again
        self._parts = tuple(BlockObjective(model, s.layers, s.low, s.high, precision) for s in slices)
        total = sum(s.share for s in slices)
        self._weights = tuple(s.share / total for s in slices)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile all blocks without their draws, as :class:`BlockObjective` does."""
        for part in self._parts:
            part.keep_draws_eager()
        self.model.compile_parts()
        super().compile(*arguments, **options)

    def forward(self, batch: Batch, key: Tensor, positions: Tensor) -> Tensor:
        """Mean over samples, and over blocks by their shares, a float32 scalar.

        Arguments are those of :class:`BlockObjective`.
        """
        losses = [part(batch, key + block, positions) for block, part in enumerate(self._parts)]
        weighted = [weight * loss for weight, loss in zip(self._weights, losses, strict=True)]
        return torch.stack(weighted).sum()
