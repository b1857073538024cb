"""Text embeddings and their mask in one tensor, so that code which selects rows of a context needs no case
for masks."""

import torch
from torch import Tensor


def with_mask(text: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (N, L, D) and a mask (N, L), true where a token is, as (N, L, D + 1)."""
    return torch.cat([text, mask[..., None].to(text.dtype)], dim=-1)


def without_mask(context: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`with_mask`."""
    return context[..., :-1], context[..., -1] > 0.5
