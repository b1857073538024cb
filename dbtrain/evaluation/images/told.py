"""What samples are told, checked before any is drawn: classes or captions of the run's data."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dbtrain.errors import ConfigError


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
