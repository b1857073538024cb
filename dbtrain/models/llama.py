"""Llama's layer (Touvron et al. 2023): RMSNorm, rotary positions,
SwiGLU; conditioned on a level at each position."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.models.layers import LevelEmbedding, check_heads
from dbtrain.models.lookup import Embedding


@dataclass(frozen=True)
class View:
    """Who sees whom: the attention of S slots over those kept before them and themselves."""

    positions: Tensor
    """(S,) positions in the text, for the rotary embedding."""
    mask: Tensor | None
    """(S, kept + S), true where a slot sees another; None for plain causal attention,
    or for one slot that sees all."""
    causal: bool
    kept: int
    """The first `kept` of the S slots stay in the cache."""


@dataclass
class KVCache:
    """Keys and values of the slots seen so far, by depth: one cache for each evaluation along the chain.

    The depth counts the layers that are applied, from 0: a looped layer has keys and values of each time.
    """

    length: int = 0
    """Slots held."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Buffers (N, heads, at least `length`, head dim), which double when they are full."""

    def extend(self, depth: int, key: Tensor, value: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Keys and values (N, heads, length + S, head dim) that the S new slots may see;
        keeps the first `kept`.

        The owner adds `kept` to `length` when all depths have been extended.
        """
        end = self.length + kept
        buffers = self.layers.get(depth, (key[:, :, :0], value[:, :, :0]))
        if buffers[0].shape[2] < end:
            room = max(end, 2 * buffers[0].shape[2]) - self.length
            buffers = tuple(torch.cat([h[:, :, : self.length], _blank(h, room)], dim=2) for h in buffers)  # type: ignore[assignment]
            self.layers[depth] = buffers
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[:, :, self.length : end] = new[:, :, :kept]
        if kept == key.shape[2]:
            return buffers[0][:, :, :end], buffers[1][:, :, :end]
        joined = [torch.cat([h[:, :, : self.length], new], 2) for h, new in zip(buffers, (key, value), strict=True)]
        return joined[0], joined[1]


def _blank(like: Tensor, slots: int) -> Tensor:
    return like.new_empty(like.shape[0], like.shape[1], slots, like.shape[3])


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding of (N, heads, S, head dim)  # Su et al.
    2021, eq. (34); halves paired, as in Llama."""
    half = x.shape[-1] // 2
    # float32 throughout: bfloat16 rounds positions above 256
    speeds = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.to(torch.float32)[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions and without biases.

    Raises:
        ConfigError: dim is not an even multiple of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads, rotary=True)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, view: View, cache: KVCache | None, depth: int) -> Tensor:
        """(N, S, dim) -> (N, S, dim)."""
        n, slots, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, slots, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, view.positions), rotate(k, view.positions)
        if cache is not None:
            k, v = cache.extend(depth, k, v, view.kept)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, is_causal=view.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, slots, dim))
        return out


ALIGNED: Mapping[str, Any] = MappingProxyType({"hidden_multiple": 64})
"""What new runs settle: 8/3 of a width is odd as often as not, and matrix products of odd widths run on
kernels for unaligned operands, on an H100 at half the speed (docs/log.md, 2026-11-26)."""


def hidden_width(dim: int, ratio: float, multiple: int) -> int:
    """Hidden width of SwiGLU: `ratio` times `dim`, rounded up to a multiple, as Llama's is to one of 256."""
    return -(-round(dim * ratio) // multiple) * multiple


class SwiGLU(nn.Module):
    """W_out(silu(W_gate x) * W_in x)  # Shazeer 2020, eq. (6)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, dim) -> (N, S, dim)."""
        gate, inner = self.gate_in(x).chunk(2, dim=-1)
        out: Tensor = self.out(functional.silu(gate) * inner)
        return out


class LlamaBlock(nn.Module):
    """Llama's layer, scaled and gated by the level at each position.

    The modulation starts at zero, so that the layer starts as the identity (adaLN-Zero without the shifts, as
    RMSNorm has none). It reads a narrow embedding of the level: a full-width one would cost half the layer
    again per position.
    """

    def __init__(self, dim: int, heads: int, hidden: int, level_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = RotaryAttention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(dim, hidden)
        self.modulation = nn.Linear(level_dim, 4 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, view: View, cache: KVCache | None = None, depth: int = 0) -> Tensor:
        """(N, S, dim) and conditions (N, S, level_dim) -> (N, S, dim)."""
        scale1, gate1, scale2, gate2 = self.modulation(functional.silu(condition)).chunk(4, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1), view, cache, depth)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2))


class LlamaHead(nn.Module):
    """Conditioned RMSNorm and a linear readout, both starting at zero."""

    def __init__(self, dim: int, level_dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(level_dim, dim)
        self.linear = nn.Linear(dim, out, bias=False)
        for weight in (self.modulation.weight, self.modulation.bias, self.linear.weight):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(N, S, dim) and (N, S, level_dim) -> (N, S, out)."""
        out: Tensor = self.linear(self.norm(x) * (1 + self.modulation(functional.silu(condition))))
        return out


class TokenStem(nn.Module):
    """Tokens, the scaled noisy codes and the level as vectors, one for each position."""

    def __init__(self, vocabulary: int, code_dim: int, dim: int, level_dim: int) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary, dim)
        # the bias keeps a slot that holds nothing but an empty code from being zero, which no gradient leaves
        self.code = nn.Linear(code_dim, dim)
        self.level = LevelEmbedding(level_dim)

    def forward(self, tokens: Tensor, code: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, T), codes (N, T, D), c_noise (N, T) -> (N, T, dim) twice and (N, T, level_dim)."""
        return self.tokens(tokens), self.code(code), self.level(c_noise)
