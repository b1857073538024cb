"""The class of an image as context: hidden at random in training, so that sampling can be guided."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, Example

LABEL_STREAM = 2
"""Stream of the draws that hides labels; 0 makes the levels and 1 the noise."""


def hide(context: Tensor, nothing: float, dropout: float, draws: Draws | None) -> Tensor:
    """The context (N, ...) of samples, in place of a share of which stands what tells nothing.

    Args:
        nothing: what stands there.
        dropout: the share.
        draws: randomness of each sample; None where nothing is hidden, as in evaluation.
    """
    if draws is None or not dropout:
        return context
    hidden = draws.uniform((), LABEL_STREAM) < dropout
    return torch.where(hidden.reshape(-1, *[1] * (context.ndim - 1)), nothing, context)


def check_hidden(dropout: float) -> None:
    """Refuse guidance of a network that knows no context that tells nothing.

    Raises:
        ConfigError: none was hidden in training.
    """
    if not dropout:
        raise ConfigError("guidance needs a model that was trained with model.label_dropout above 0; ask for 1")


@dataclass(frozen=True)
class ClassLabels:
    """Numbers of the classes, and one more that stands for no class."""

    no_class: int
    dropout: float
    """Share of the training labels that are hidden."""

    def example(self, batch: Batch, draws: Draws | None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,); draws hide a share of the labels."""
        label = hide(batch["label"], self.no_class, self.dropout, draws)
        return Example(clean=batch["image"], context=label, target=batch["image"])

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells no class, (N,).

        Raises:
            ConfigError: no label was hidden in training, so that the network knows no such context.
        """
        check_hidden(self.dropout)
        return torch.full_like(context, self.no_class)
