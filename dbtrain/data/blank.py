"""A batch without data, for counting what a model takes before any data is read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def blank(shape: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """The tensors of a batch of `count` samples, filled with zeros, as a data set of this shape makes them.

    Args:
        shape: of the data set: ``image`` (C, H, W) for labelled images, ``length`` for token sequences.
        count: samples.
    """
    if "image" in shape:
        return {"image": torch.zeros(count, *shape["image"]), "label": torch.zeros(count, dtype=torch.int64)}
    return {"tokens": torch.zeros(count, shape["length"], dtype=torch.int64)}
