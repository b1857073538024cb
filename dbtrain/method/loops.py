"""Looped layers: in which order a block applies its layers, some of them more than once."""

from collections.abc import Sequence
from itertools import groupby

from dbtrain.errors import ConfigError

Loops = Sequence[int]
"""How often each layer of the whole model is applied."""


def check_loops(loops: Loops | None, depth: int) -> None:
    """Refuse loops that do not have one count for each layer of the whole model.

    Raises:
        ConfigError: they do not.
    """
    if loops is None or len(loops) == depth:
        return
    pattern = list(loops) or [1]
    whole = [pattern[i % len(pattern)] for i in range(depth)]
    raise ConfigError(
        f"model.loops={list(loops)} has {len(loops)} counts, and the model has model.depth={depth} layers: give one "
        f"for each layer of the whole model, as in 'model.loops={whole}', or model.loops=null"
    )


def order(layers: range, loops: Loops | None) -> tuple[int, ...]:
    """The layers of one block in the order of their application,
    which always ends with the block's last layer.

    Neighbours with the same count are one group, which is applied as a whole that many times: with counts 1,
    2, 2, 1 layers 0 to 3 are applied as 0, 1, 2, 1, 2, 3.  # Huginn, section 3.1: prelude, recurrent core,
    coda

    Args:
        layers: numbers of the block's layers in the whole model.
        loops: counts of the whole model; None if every layer is applied once.
    """
    if loops is None:
        return tuple(layers)
    groups = groupby(layers, key=lambda layer: loops[layer])
    return tuple(layer for count, group in groups for layer in tuple(group) * count)
