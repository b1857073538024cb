"""Inception-v3 as torch-fidelity has it, for FID proper; its weights come from a safetensors file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dbtrain.config import Config
from dbtrain.config.data import LatentsConfig
from dbtrain.errors import ConfigError, DataError, first_line
from dbtrain.shards.foreign_tensors import read_tensors


def check_inception(config: Config) -> None:
    """Check, before anything is trained, that FID can be measured afterwards.

    Raises:
        ConfigError: the data are latents, or the weights or torch-fidelity are missing.
    """
    if isinstance(config.data, LatentsConfig):
        raise ConfigError(
            "evaluation.metric=frechet_inception compares pictures, and data.source=latents holds none: set it to "
            "frechet_classifier"
        )
    path = config.evaluation.inception
    if path is None or not Path(path).is_file():
        raise ConfigError(
            f"evaluation.metric=frechet_inception needs evaluation.inception, a safetensors file: {path!r} is none"
        )
    if find_spec("torch_fidelity") is None:
        raise ConfigError("evaluation.metric=frechet_inception needs torch-fidelity: pip install torch-fidelity")


class Inception(nn.Module):
    """Features (N, 2048) of images.

    Args:
        path: safetensors file of the state of torch-fidelity's ``weights-inception-2015-12-05``.

    Raises:
        DataError: the file is missing, damaged, or holds other weights.
    """

    num_features = 2048

    def __init__(self, path: str) -> None:
        super().__init__()
        self.network = _network(read_tensors(Path(path)), path)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) in [-1, 1], which become bytes first, as they would in a file."""
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self.network(pixels.expand(-1, 3, -1, -1))
        return features


def _network(weights: dict[str, Tensor], path: str) -> Any:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        # torch-fidelity can only read its weights from an unrestricted pickle: torch.load is made to return
        # the weights that were read here
        with mock.patch("torch.load", lambda *_, **__: weights):
            # without antialiasing, images are resized as in TensorFlow 1, with which published FIDs are made
            return NoTrainInceptionV3("inception-v3-compat", ["2048"], path, antialias=False)
    except RuntimeError as error:
        raise DataError(
            f"{path} does not hold the weights of torch-fidelity's Inception: {first_line(error)}"
        ) from error
