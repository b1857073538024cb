"""Which noise range block b owns (`of`), and the wider one that it trains on (`widened`).

Block 0 owns the noisiest slice; ``block_of`` is the one map from level to block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.levels import LevelDistribution


@dataclass(frozen=True)
class Ranges:
    """B slices that tile the noise range. Slice b is the half-open interval ``(edges[b + 1], edges[b]]``.

    The lower edge is left out and the upper edge belongs to the block, because a sampler enters a slice at
    its upper edge.

    Raises:
        ConfigError: the edges do not fall strictly, or one is below 0 or not finite.
    """

    edges: tuple[float, ...]
    """B + 1 falling levels, from the greatest noise to the least."""

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if len(self.edges) < 2 or not falling or not all(0 <= e < math.inf for e in self.edges):
            raise ConfigError(
                f"noise edges {list(self.edges)} do not tile a range: give blocks + 1 finite levels that fall "
                "strictly, from the most noise to the least"
            )

    @property
    def blocks(self) -> int:
        """Number of slices."""
        return len(self.edges) - 1

    def of(self, block: int) -> tuple[float, float]:
        """(low, high) of a block."""
        return self.edges[block + 1], self.edges[block]

    def widened(self, block: int, overlap: float) -> tuple[float, float]:
        """(low, high) for training: wider by `overlap` of the slice's log width at both ends, within the
        full range  # paper, section 3.3 (gamma)

        A range that ends at 0 (masked shares) has no log width, so there the slice grows by `overlap` times
        its plain width.
        """
        low, high = self.of(block)
        if overlap == 0:
            return low, high
        if self.edges[-1] == 0:
            extra = overlap * (high - low)
            return max(low - extra, 0.0), min(high + extra, self.edges[0])
        factor = (high / low) ** overlap
        return max(low / factor, self.edges[-1]), min(high * factor, self.edges[0])

    def trained_at(self, level: float, overlap: float) -> tuple[int, ...]:
        """Numbers of the blocks whose widened slice holds a level, ascending: its owner, and near a boundary
        its neighbour too."""
        owner = self.owner(level)
        slices = [self.widened(block, overlap) for block in range(self.blocks)]
        return tuple(b for b, (low, high) in enumerate(slices) if b == owner or low <= level <= high)

    def owner(self, level: float) -> int:
        """Number of the block that owns one level; see :meth:`block_of` for many."""
        return int(self.block_of(torch.tensor(level, dtype=torch.float64)))

    def block_of(self, level: Tensor) -> Tensor:
        """Block that owns each level, int64, same shape; levels
        outside the range belong to the nearest block."""
        rising = torch.tensor(self.edges[-2:0:-1], dtype=torch.float64, device=level.device)
        return (self.blocks - 1) - torch.bucketize(level.double(), rising, right=False)

    @staticmethod
    def from_hex(edges: Sequence[str]) -> "Ranges":
        """Read the edges from hexadecimal floats, which are exact on disk."""
        return Ranges(tuple(float.fromhex(edge) for edge in edges))


def equal_shares(distribution: LevelDistribution, blocks: int) -> Ranges:
    """Edges between which the distribution has equal mass:
    q_b = q_min + (b/B)(q_max - q_min)  # paper, eq. (9).

    Under the log-normal this is the paper's equal-probability rule; under a
    measured information curve it gives every block the same amount to decide.
    """
    shares = torch.arange(blocks, -1, -1, dtype=torch.float64) / blocks
    edges = distribution.quantile(shares).tolist()
    # the ends are set to the exact bounds, which the quantile function may miss by rounding
    return Ranges((distribution.high, *edges[1:-1], distribution.low))


def explicit(edges: Sequence[float], blocks: int) -> Ranges:
    """Ranges given by the user.

    Raises:
        ConfigError: not blocks + 1 edges, or they do not tile.
    """
    if len(edges) != blocks + 1:
        raise ConfigError(f"noise.edges has {len(edges)} values; blocks={blocks} needs {blocks + 1}")
    return Ranges(tuple(float(edge) for edge in edges))
