"""Layers that several architectures share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dbtrain.errors import ConfigError
from dbtrain.method.interface import BlockModel


def draw_normal(values: Tensor, std: float = 0.02) -> Tensor:
    """Fill with normal numbers, in place; not on the meta device, which holds none.

    There PyTorch 2.11 would load its compiler first, which takes a second of every command.
    """
    with torch.no_grad():
        return values if values.is_meta else values.normal_(std=std)


def check_heads(dim: int, heads: int, rotary: bool = False) -> None:
    """Whether the width divides into heads; rotary positions turn pairs of elements.

    Raises:
        ConfigError: it does not.
    """
    unit = (2 if rotary else 1) * heads
    if dim % unit:
        fitting = [n for n in range(1, dim + 1) if dim % ((2 if rotary else 1) * n) == 0]
        near = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:3])
        kind = "an even multiple" if rotary else "a multiple"
        instead = f"model.heads={' or '.join(map(str, near))}, or " if near else ""
        wider = -(-dim // unit) * unit
        raise ConfigError(f"model.dim={dim} is not {kind} of model.heads={heads}: set {instead}model.dim={wider}")


def picture_size(image: Sequence[int], of: str) -> tuple[int, int, int]:
    """(channels, height, width) of the data's images, for a network that reads no videos.

    Args:
        image: as the data's shape has it.
        of: name of the network.

    Raises:
        ConfigError: they are videos, or latents of an autoencoder for videos.
    """
    if len(image) != 3:
        size = "x".join(map(str, image))
        raise ConfigError(f"{of} is for images, and the data has videos of {size}: choose other data, or hf_wan")
    return image[0], image[1], image[2]


def check_patches(image: tuple[int, int, int], patch: int) -> None:
    """Whether a (channels, height, width) image is a whole number of patches.

    Raises:
        ConfigError: it is not.
    """
    picture_size(image, "this model.arch")
    if image[1] % patch or image[2] % patch:
        raise ConfigError(
            f"model.patch={patch} does not divide the {image[1]}x{image[2]} image (height x width): choose another "
            "patch, or for pictures a data.size that is a multiple of it"
        )


class LevelEmbedding(nn.Module):
    """The level as a conditioning vector: sinusoids of c_noise, then a two-layer network, always in float32.

    bfloat16 has 8 bits of mantissa: it would round neighbouring levels to the same number.
    """

    def __init__(self, dim: int, frequencies: int = 64, max_frequency: float = 100.0) -> None:
        super().__init__()
        # computed on the CPU: on the meta device PyTorch 2.11 would load sympy for it, which takes a second
        spread = torch.logspace(0, math.log10(max_frequency), frequencies, device="cpu")
        self.register_buffer("frequencies", spread.to(torch.get_default_device()), persistent=False)
        self.network = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        """(...,) -> (..., dim), float32."""
        with torch.autocast(c_noise.device.type, enabled=False):
            angles = c_noise.float()[..., None] * self.get_buffer("frequencies")
            embedded: Tensor = self.network(torch.cat([angles.cos(), angles.sin()], dim=-1))
            return embedded


class SelfAttention(nn.Module):
    """Multi-head self-attention over (N, T, dim).

    Raises:
        ConfigError: dim is not a multiple of heads.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, dim) -> (N, T, dim)."""
        n, t, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, t, dim))
        return out


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: float, dropout: float = 0.0) -> None:
        hidden = int(dim * ratio)
        super().__init__(
            nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale (N, T, dim) by vectors (N, dim)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaLNBlock(nn.Module):
    """Transformer layer conditioned by adaLN-Zero  # Peebles & Xie 2023, section 3.2.

    The modulation starts at zero, so that the layer starts as the identity.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = FeedForward(dim, mlp_ratio, dropout)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(N, T, dim) and a condition (N, dim) -> (N, T, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(functional.silu(condition)).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class AdaLNHead(nn.Module):
    """Conditioned normalisation and a linear readout, both starting at zero."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, out)
        for part in (self.modulation, self.linear):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(N, T, dim) and (N, dim) -> (N, T, out)."""
        shift, scale = self.modulation(functional.silu(condition)).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out


class Recomputed:
    """A layer's forward pass that keeps its input only, and runs again in the backward pass.

    Args:
        forward: forward pass of the layer.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        """Run the layer's own forward pass."""
        out: Tensor = checkpoint(self.forward, *args, use_reentrant=False, **keywords)
        return out


def recompute(model: nn.Module) -> None:
    """Activation checkpointing of every layer.

    The layers' `forward` is replaced, not the layers, so that parameters keep their names.
    """
    for layer in model.get_submodule("layers").children():
        layer.forward = Recomputed(layer.forward)


def compile_recomputed(model: nn.Module, **options: Any) -> None:
    """Compile each layer of a model under :func:`recompute` by itself, with options of `torch.compile`.

    In one graph of the whole model most of the memory that recomputation saves is lost again: the
    peak was 0.74 to 0.80 of that without it, and is 0.26 layer by layer (docs/benchmarks.md).
    """
    cast(BlockModel, model).compile_parts()
    for layer in model.get_submodule("layers").children():
        again = cast(Recomputed, layer.forward)
        again.forward = torch.compile(again.forward, **options)
