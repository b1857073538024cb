"""Inception-v3 as torch-fidelity has it, for FID proper; its weights come from a safetensors file."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError, DataError, first_line
from dbtrain.shards.tensor_file import read_tensors


class Inception(nn.Module):
    """Features (N, 2048) of images.

    Args:
        path: safetensors file of the state of torch-fidelity's ``weights-inception-2015-12-05``.

    Raises:
        ConfigError: no path is given, or torch-fidelity is not installed.
        DataError: the file is missing, damaged, or holds other weights.
    """

    num_features = 2048

    def __init__(self, path: str | None) -> None:
        super().__init__()
        if path is None:
            raise ConfigError("evaluation.metric=frechet_inception needs evaluation.inception, a safetensors file")
        self.network = _network(read_tensors(Path(path)), path)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) in [-1, 1], which become bytes first, as they would in a file."""
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self.network(pixels.expand(-1, 3, -1, -1))
        return features


def _network(weights: dict[str, Tensor], path: str) -> Any:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        # torch-fidelity reads its weights by an unrestricted pickle, and by no other way: it is given ours instead
        with mock.patch("torch.load", lambda *_, **__: weights):
            # without antialiasing images are resized as by the first TensorFlow, on which published FIDs rest
            return NoTrainInceptionV3("inception-v3-compat", ["2048"], path, antialias=False)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"evaluation.metric=frechet_inception needs torch-fidelity ({error}): pip install torch-fidelity"
        ) from error
    except RuntimeError as error:
        raise DataError(
            f"{path} does not hold the weights of torch-fidelity's Inception: {first_line(error)}"
        ) from error
