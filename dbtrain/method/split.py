"""Which layers block b owns, and what each of its parameters is called in the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dbtrain.errors import ConfigError

Partition = Literal["even", "front", "back"]
"""How layers are shared out: evenly, or more of them to blocks near the front (the noise) or the back."""

PRIVATE_GROUPS = ("stem", "head")
"""Parameter groups of which every block has its own copy;
``layers.<i>`` are numbered over the whole model."""


@dataclass(frozen=True)
class LayerSplit:
    """Contiguous runs of layers, one a block; block 0 holds the first layers and owns the noisiest slice."""

    bounds: tuple[int, ...]
    """B + 1 increasing layer numbers; block b owns ``range(bounds[b], bounds[b + 1])``."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of layers of each block."""
        return tuple(len(self.layers(block)) for block in range(self.blocks))

    def layers(self, block: int) -> range:
        """Layer numbers of a block, as in the whole model."""
        return range(self.bounds[block], self.bounds[block + 1])


def split_evenly(num_layers: int, blocks: int) -> LayerSplit:
    """Split layers as evenly as possible; the first blocks take the layers left over.

    Raises:
        ConfigError: there are more blocks than layers, or no block.
    """
    if not 1 <= blocks <= num_layers:
        raise ConfigError(
            f"blocks={blocks} cannot share {num_layers} layers: choose blocks from 1 to {num_layers}, "
            "or a deeper model (model.depth)"
        )
    small, extra = divmod(num_layers, blocks)
    return split_by_sizes(num_layers, [small + (b < extra) for b in range(blocks)])


def split_by_sizes(num_layers: int, sizes: Sequence[int]) -> LayerSplit:
    """Split by the number of layers of each block.

    Raises:
        ConfigError: a size is below one, or the sizes do not add up to the number of layers.
    """
    if any(size < 1 for size in sizes) or sum(sizes) != num_layers:
        raise ConfigError(
            f"layers_per_block={list(sizes)} must be positive and add up to model.depth={num_layers} "
            f"(it adds up to {sum(sizes)})"
        )
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return LayerSplit(tuple(bounds))


def partition(name: str, num_layers: int, blocks: int) -> tuple[int, ...]:
    """Layers of each block: `front` in proportion B : B-1 : ... : 1, rounded, at least one; `back` reversed.

    Only `dbtrain ablate` asks for it; a run is split evenly or by `layers_per_block`.

    Raises:
        ConfigError: there is no such partition, or there are more blocks than layers.
    """
    if name not in get_args(Partition):
        raise ConfigError(f"partition {name!r} is none of {', '.join(get_args(Partition))}")
    even = split_evenly(num_layers, blocks)
    if name == "even":
        return even.sizes
    shares = [2 * num_layers * (blocks - b) / (blocks * (blocks + 1)) for b in range(blocks)]
    sizes = [1] * blocks
    for _ in range(num_layers - blocks):
        sizes[max(range(blocks), key=lambda b: shares[b] - sizes[b])] += 1
    return tuple(sizes if name == "front" else reversed(sizes))


def global_name(block: int, name: str) -> str:
    """Name of a worker's parameter in the merged model.

    A worker's layers already carry their number in the whole model; its stem and head are private, so
    they get the block's prefix: ``stem.patch.weight`` of block 2 is ``blocks.2.stem.patch.weight``. Frozen
    stems and heads belong to no block; their names do not pass through here and stay ``stem.*`` and
    ``head.*``.

    Raises:
        ValueError: the parameter is in none of the groups that a block owns.
    """
    group = name.split(".", 1)[0]
    if group == "layers":
        return name
    if group in PRIVATE_GROUPS:
        return f"blocks.{block}.{name}"
    raise ValueError(f"parameter {name!r} is in none of the groups layers, {', '.join(PRIVATE_GROUPS)}")


def local_name(block: int, name: str) -> str:
    """Inverse of :func:`global_name` for a name that the block owns.

    Raises:
        ValueError: the name belongs to another block's stem or head, or to no group that a block owns.
            Numbers of layers are not checked here.
    """
    prefix = f"blocks.{block}."
    local = name.removeprefix(prefix)
    if name.startswith("layers.") or (name.startswith(prefix) and local.split(".", 1)[0] in PRIVATE_GROUPS):
        return local
    raise ValueError(f"{name!r} is not a parameter of block {block}")
