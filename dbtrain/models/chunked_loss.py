"""Cross-entropy over a large vocabulary, some positions at a time.

The logits of 16 texts of 1,024 tokens over 50,000 words are 3.3 GB in float32, and their gradients as much
again. Here only those of one chunk exist at a time: the backward pass computes them again, as activation
checkpointing does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 1 << 27
"""Logits of one chunk at most: 0.5 GiB in float32. What has no more is computed at once."""

Readout = Callable[[Tensor, Tensor], Tensor]
"""(hidden (n, dim), condition (n, c)) -> logits (n, V)."""


def token_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (N, T) in nats, of logits (N, T, V) and tokens (N, T)."""
    return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


class CrossEntropy:
    """Losses of positions by a readout; no module, so that the readout's parameters keep their one name.

    Its chunks follow from the shapes alone, so a step gives the same bits each time.
    """

    def __init__(self) -> None:
        self.most: int | None = MOST_LOGITS
        """Logits of a chunk; None computes all at once, whatever the size."""
        self._of_chunk: Callable[..., Tensor] = _cross_entropy
        self._in_chunks: Callable[..., Tensor] = self._one_after_the_other

    def wants_chunks(self, positions: int, vocabulary: int) -> bool:
        """Whether so many positions are too many to have their logits at once."""
        return self.most is not None and positions * vocabulary > self.most

    def __call__(self, readout: Readout, hidden: Tensor, condition: Tensor, target: Tensor, vocabulary: int) -> Tensor:
        """Cross-entropy (N, T) in nats, float32, in chunks.

        Args:
            readout: a module, which runs under the caller's autocast.
            hidden: (N, T, dim).
            condition: (N, T, c).
            target: (N, T) int64.
            vocabulary: outputs of the readout.
        """
        parts = hidden.flatten(0, 1), condition.flatten(0, 1), target.flatten()
        assert self.most is not None, "asked for chunks without a size"
        return self._in_chunks(readout, *parts, max(1, self.most // vocabulary)).view_as(target)

    def _one_after_the_other(self, readout: Readout, *parts: Any) -> Tensor:
        *tensors, size = parts
        chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
        # nothing in a readout is random
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self._of_chunk, readout, *chunk, **options) for chunk in chunks])

    def compile(self, **options: Any) -> None:
        """Compile the losses of one chunk by themselves, with options of `torch.compile`.

        In one graph with the rest the compiler may keep, or compute early, what was to be computed again.
        """
        self._of_chunk = torch.compile(_cross_entropy, **options)
        self._in_chunks = torch.compiler.disable(self._one_after_the_other)  # type: ignore[no-untyped-call]


def _cross_entropy(readout: Readout, hidden: Tensor, condition: Tensor, target: Tensor) -> Tensor:
    logits = readout(hidden, condition)
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), target, reduction="none")
