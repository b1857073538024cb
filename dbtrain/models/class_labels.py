"""The class of an image as context: hidden at random in training, so that sampling can be guided."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch, Example

LABEL_STREAM = 2
"""Stream of the draws that hides labels; 0 makes the levels and 1 the noise."""


@dataclass(frozen=True)
class ClassLabels:
    """Numbers of the classes, and one more that stands for no class."""

    no_class: int
    dropout: float
    """Share of the training labels that are hidden."""

    def example(self, batch: Batch, draws: Draws | None) -> Example:
        """``image`` (N, C, H, W) and ``label`` (N,); draws hide a share of the labels."""
        label = batch["label"]
        if draws is not None and self.dropout:
            hidden = draws.uniform((), LABEL_STREAM) < self.dropout
            label = torch.where(hidden, self.no_class, label)
        return Example(clean=batch["image"], context=label, target=batch["image"])

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells no class, (N,).

        Raises:
            ConfigError: no label was hidden in training, so that the network knows no such context.
        """
        if not self.dropout:
            raise ConfigError("guidance needs a model that was trained with model.label_dropout above 0; ask for 1")
        return torch.full_like(context, self.no_class)
