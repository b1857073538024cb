"""What a GPU can hold: how deep a model may be, and whether it needs blocks at all."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dbtrain.config import Config
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError
from dbtrain.models.registry import architecture
from dbtrain.run.cost import Memory, estimate
from dbtrain.run.plan import RunPlan
from dbtrain.run.prepare import sketch
from dbtrain.telemetry.console import size

BLOCKS = (1, 2, 4, 8)
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
LINEAR = ("parameters", "gradients", "optimizer", "average", "activations")
"""Parts of an estimate that grow by the same with each layer."""


def memory_of(given: str | None) -> int | None:
    """Bytes of a GPU: those given, as in ``80GiB``, or of this machine's first one; None without either.

    Raises:
        ConfigError: it is no such size.
    """
    if given is None:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    read = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB)", given)
    if read is None or float(read[1]) == 0:
        raise ConfigError(f"--memory {given}: give a number and its unit, MiB or GiB, as in --memory 80GiB")
    return int(float(read[1]) * UNITS[read[2]])


def lines(
    config: Config, data: DataSet, whole: RunPlan, micro_batch: int, memory: int | None, device: str
) -> Iterator[str]:
    """What fits on one GPU, in sentences.

    Args:
        config: configuration of the run.
        data: the data that it is trained on.
        whole: plan of the same model trained end to end.
        micro_batch: samples at once on a worker.
        memory: bytes of the GPU; None if it is not known.
        device: what the blocks are planned for, ``cuda`` if the nodes have GPUs.
    """
    if memory is None:
        lacking = "how much memory those GPUs have is not known here" if device == "cuda" else "there is no GPU here"
        yield f"{lacking}: --memory 80GiB says what would fit on one of that size"
        return
    yield _whole(whole, micro_batch, memory)
    if config.model.loops is None and not architecture(config.model.arch).most_blocks:
        depths = largest_depths(config, data, micro_batch, memory)
        told = ", ".join(f"{depth} layers at B={blocks}" for blocks, depth in depths.items())
        yield f"on a GPU of {size(memory)}, with micro-batches of {micro_batch}, estimated: at most {told}"


def _whole(whole: RunPlan, micro_batch: int, memory: int) -> str:
    """Whether one GPU holds the whole model, and by what means: who does not need blocks should be told."""
    ways: dict[str, dict[str, Any]] = {
        "as it is": {"activation_checkpointing": False},
        "with activation checkpointing": {"activation_checkpointing": True},
        "with activation checkpointing and the optimizer offloaded": {
            "activation_checkpointing": True,
            "offload": "optimizer",
            "zero_stage": max(1, whole.config.training.zero_stage),
        },
    }
    for way, changes in ways.items():
        training = whole.config.training.model_copy(update=changes)
        of = replace(whole, config=whole.config.model_copy(update={"training": training}))
        needed = estimate(of, 0, micro_batch, 1).total
        if needed <= memory:
            return (
                f"the whole model would fit end to end on one GPU of {size(memory)} {way} ({size(needed)}, estimated): "
                "blocks are not needed for its memory, and plain training is the simpler choice"
            )
    return (
        f"the whole model does not fit end to end on one GPU of {size(memory)}, not even {way} "
        f"({size(needed)}, estimated)"
    )


def largest_depths(config: Config, data: DataSet, micro_batch: int, memory: int) -> dict[int, int]:
    """Layers of the deepest model whose blocks each fit on a GPU, by the number of blocks; 0 for none."""
    one, two = (estimate(_of_depth(config, data, depth), 0, micro_batch, 1) for depth in (1, 2))
    return {blocks: blocks * _most_layers(one, two, memory) for blocks in BLOCKS}


def _most_layers(one: Memory, two: Memory, memory: int) -> int:
    """Layers of a block that fit, by the estimates of blocks of one and of two."""

    def total(layers: int) -> int:
        grown = {name: getattr(one, name) + (layers - 1) * (getattr(two, name) - getattr(one, name)) for name in LINEAR}
        return replace(one, **grown).total

    least, beyond = 0, 1
    while total(beyond) <= memory:
        least, beyond = beyond, 2 * beyond
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if total(middle) <= memory else (least, middle)
    return least


def _of_depth(config: Config, data: DataSet, depth: int) -> RunPlan:
    """The plan of one block of so many layers, with the exceptions of no block."""
    training = config.training.model_copy(update={"blocks": {}})
    changes: dict[str, Any] = {
        "blocks": 1,
        "layers_per_block": None,
        "model": config.model.model_copy(update={"depth": depth}),
        "noise": config.noise.model_copy(update={"edges": None}),
        "cluster": config.cluster.model_copy(update={"blocks": {}}),
        "training": training,
    }
    return sketch(config.model_copy(update=changes), data)
