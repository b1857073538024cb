"""The caption of an image as context: embeddings of its tokens with their mask, at random hidden in
training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, Example
from dbtrain.method.masked_context import with_mask
from dbtrain.models.class_labels import check_hidden, hide


@dataclass(frozen=True)
class Captions:
    """What stands for no caption are zeros everywhere, also in the mask: no token is there."""

    dropout: float
    """Share of the training captions that are hidden."""

    def example(self, batch: Batch, draws: Draws | None) -> Example:
        """``image`` (N, C, ...), ``text`` (N, L, D) and ``mask`` (N, L); draws hide a share of the
        captions."""
        context = hide(with_mask(batch["text"], batch["mask"]), 0.0, self.dropout, draws)
        return Example(clean=batch["image"], context=context, target=batch["image"])

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells no caption, (N, L, D + 1).

        Raises:
            ConfigError: no caption was hidden in training, so that the network knows no such context.
        """
        check_hidden(self.dropout)
        return torch.zeros_like(context)
