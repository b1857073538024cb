"""Random numbers as pure functions of (run seed, block, step, position in the batch, element).

A counter-based generator instead of a stateful one: nothing to save in a checkpoint, the same bits on
every device, and the same noise for a sample however the batch is cut over workers and micro-batches.
"""

import hashlib
import math

import torch
from torch import Tensor

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from any parts, such as (run seed,
    block, step); equal parts give equal seeds everywhere."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # torch has no unsigned 64-bit shift: shift arithmetically, then clear the copies of the sign
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    # SplitMix64 finaliser (Steele, Lea, Flood 2014); int64 products wrap modulo 2^64
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def _signed(value: int) -> int:
    """A Python integer modulo 2^64, as int64 holds it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class Draws:
    """Uniforms and normals for the samples of one step.

    Args:
        key: int64 scalar tensor from :func:`derive_seed`; a tensor,
            so that a compiled step is not compiled again.
        positions: (N,) int64 positions of the samples in the effective batch.
    """

    def __init__(self, key: Tensor, positions: Tensor) -> None:
        self.key = key
        self.positions = positions

    def uniform(self, shape: tuple[int, ...], stream: int) -> Tensor:
        """(N, *shape) float32 in (0, 1); different streams are independent."""
        count = math.prod(shape)
        sample = _mix(self.key + (self.positions + 1) * _GOLDEN + _signed(stream * _MIX_2))
        element = torch.arange(1, count + 1, device=self.positions.device) * _GOLDEN
        bits = _shift_right(_mix(sample[:, None] + element[None, :]), 41)
        # A float32 holds 24 bits: 23 random ones and the added half fit exactly. With one random bit more the
        # largest number would round to 1, whose quantile is infinite. The half also keeps 0 out.
        return ((bits.to(torch.float32) + 0.5) * 2.0**-23).reshape(-1, *shape)

    def normal(self, shape: tuple[int, ...], stream: int) -> Tensor:
        """(N, *shape) float32 standard normal, by the inverse
        distribution function (so within 5.3 of zero)."""
        return math.sqrt(2.0) * torch.erfinv(2.0 * self.uniform(shape, stream) - 1.0)

    def spread(self, stream: int) -> Tensor:
        """(N,) float32 in (0, 1) that cover it evenly: one uniform start,
        then steps of the golden ratio by position.

        Each number by itself is uniform; a mean over neighbouring positions varies far less than the mean of
        independent draws.
        """
        start = Draws(self.key, torch.zeros_like(self.positions[:1])).uniform((), stream).double()
        spread = torch.frac(start + self.positions.double() * GOLDEN_RATIO)
        # the bounds keep the number from being 0 or 1 after it is rounded to float32
        return spread.clamp(2.0**-24, 1 - 2.0**-24).float()

    def fork(self, number: int) -> "Draws":
        """Independent draws for the same positions, for the `number`-th of several steps."""
        return Draws(_mix(self.key + _signed((number + 1) * _MIX_1)), self.positions)
