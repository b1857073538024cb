"""What a model is asked with, checked: classes or captions of samples, pixels of images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dbtrain.errors import ConfigError

PIXEL_SLACK = 1e-3
"""A pixel may lie beyond -1 and 1 by so much, as resizing and rounding leave it."""


def check_pixels(images: Tensor, shape: Mapping[str, Any]) -> None:
    """Refuse images of another scale than in training, which would get wrong answers.

    Args:
        images: (N, C, H, W).
        shape: shape of the data that the model was trained on; latents have no scale that is known.

    Raises:
        ConfigError: they are no floats from -1 to 1.
    """
    if "image" not in shape or "latent_scale" in shape:
        return
    largest = float(images.float().abs().max()) if images.numel() else 0.0
    if not images.is_floating_point() or not largest <= 1 + PIXEL_SLACK:  # NaN is not either
        raise ConfigError(
            f"images of {images.dtype}, up to {largest:g}, do not fit: this model takes floats from -1 (black) to 1 "
            "(white); bytes become that by images / 255 * 2 - 1"
        )


def check_told(told: Tensor, shape: Mapping[str, Any]) -> None:
    """Refuse what a model was never told.

    Args:
        told: class numbers (N,), or captions (N, L, D + 1) as `with_mask` makes them.
        shape: shape of the data that the model was trained on.

    Raises:
        ConfigError: a number is of no class, or the captions have another length or width.
    """
    if "classes" in shape:
        known = int(shape["classes"])
        if told.ndim != 1 or told.is_floating_point() or not bool(((told >= 0) & (told < known)).all()):
            raise ConfigError(f"classes must be whole numbers (N,) from 0 to {known - 1}, not {told.tolist()!s:.60}")
    elif "text" in shape:
        length, width = shape["text"]
        if tuple(told.shape[1:]) != (length, width + 1):
            raise ConfigError(
                f"captions must be embeddings with their mask (N, {length}, {width + 1}) as with_mask(text, mask) "
                f"makes them, not {tuple(told.shape)}"
            )
