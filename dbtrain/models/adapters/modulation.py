"""How a network that knows no level is told it: its norms are scaled and shifted, at first by nothing.

At zero the layer is bit for bit the original  # adaLN-Zero without gates, Peebles & Xie 2023, section 3.2
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.models.adapters.stack import ADDED

Told = dict[str, Tensor]


class LevelAdded(nn.Module):
    """Scales and shifts of all norms of a layer, made from a condition (..., level_dim); both start at
    zero."""

    def __init__(self, level_dim: int, width: int, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.modulation = nn.Linear(level_dim, pieces * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """One tensor (..., width) for each scale and shift."""
        parts: tuple[Tensor, ...] = self.modulation(functional.silu(condition)).chunk(self.pieces, dim=-1)
        return parts


class _Norm:
    """A norm's forward pass, then the scale and shift of this evaluation."""

    def __init__(self, forward: Callable[[Tensor], Tensor], now: list[Tensor], first: int, pieces: int) -> None:
        self.forward, self.now, self.first, self.pieces = forward, now, first, pieces

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self.forward(hidden)
        if not self.now:
            return normed
        normed = normed * (1 + self.now[self.first])
        return normed + self.now[self.first + 1] if self.pieces > 1 else normed


class _Layer:
    """A layer's forward pass that is told the level as the keyword `condition`.

    What the norms are to use lies in a list of this layer's, filled here, so that a backward pass that runs
    the layer again fills it again.
    """

    def __init__(self, forward: Callable[..., Any], added: LevelAdded, now: list[Tensor]) -> None:
        self.forward, self.added, self.now = (forward,), (added,), now

    def __call__(self, *inputs: Any, condition: Tensor | None = None, **keywords: Any) -> Any:
        self.now[:] = [] if condition is None else self.added[0](condition)
        try:
            return self.forward[0](*inputs, **keywords)
        finally:
            self.now.clear()


def modulate(layer: nn.Module, norms: Mapping[str, int], width: int, level_dim: int) -> None:
    """Let a layer be told the level; its own parameters keep their names, and `added` joins them.

    The forward passes are replaced and not the modules, as `recompute` in models/layers.py does.

    Args:
        layer: layer of the original.
        norms: `Stack.modulated`; if it is empty, nothing is done.
        width: width of the hidden states.
        level_dim: width of the condition.
    """
    if not norms:
        return
    added = LevelAdded(level_dim, width, sum(norms.values()))
    layer.add_module(ADDED, added)
    now: list[Tensor] = []
    first = 0
    for name, pieces in norms.items():
        norm = layer.get_submodule(name)
        norm.forward = _Norm(norm.forward, now, first, pieces)
        first += pieces
    layer.forward = _Layer(layer.forward, added, now)


@torch.no_grad()
def zero(linear: nn.Linear) -> nn.Linear:
    """A linear layer that starts by adding nothing."""
    for parameter in linear.parameters():
        parameter.zero_()
    return linear
