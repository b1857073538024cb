"""Decide split, ranges and codebook of a run from its configuration and data; no store is touched."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from dbtrain.config import Config
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook
from dbtrain.method.gaussian import NoNoise
from dbtrain.method.noise_processes import noise_process
from dbtrain.method.ranges import explicit
from dbtrain.method.schemes import SCHEMES
from dbtrain.method.split import LayerSplit, split_by_sizes, split_evenly
from dbtrain.models.registry import architecture
from dbtrain.run.corpus_codebook import corpus_codebook
from dbtrain.run.plan import RunPlan, noise_target

Calibrate = Callable[[Config, DataSet, Tensor], Mapping[str, Any]]
"""(config, data, codebook) -> a level distribution as stored in run.json, from a pilot on the data."""


def design(config: Config, data: DataSet, calibrate: Calibrate, codes: Tensor | None = None) -> RunPlan:
    """Decide everything that training needs; touches no store.

    Args:
        config: configuration of the run.
        data: the data that it is trained on.
        calibrate: measures the range of the noise.
        codes: the codebook (V, D) of the weights that the run starts from, which it takes over; None to make
            one.

    Raises:
        ConfigError: blocks and layers, or ranges, do not fit.
    """
    kind = architecture(config.model.arch)
    unknown = [name for name in (kind.codes, *kind.takes) if name and name not in data.shape]
    if unknown:
        raise ConfigError(
            f"model.arch={config.model.arch} needs data with {' and '.join(unknown)}, and data.source="
            f"{config.data.source} has {', '.join(data.shape)}: choose another data.source"
        )
    split = split_of(config)
    codebook = None
    if kind.codes:
        codebook = _codebook(config, data, int(str(data.shape[kind.codes])), codes)
    if target_of(config) == "hidden":
        levels = NoNoise().split(split.blocks)
        return RunPlan(config, split, levels, {"kind": "none"}, codebook, data.shape, settled=kind.settled)
    target = noise_target(config, data.shape, codebook)

    def measure() -> Mapping[str, Any]:
        assert codebook is not None  # a noise process measures nothing but codebooks
        return calibrate(config, data, codebook)

    process, edges = noise_process(config.noise_process), config.noise.edges
    distribution = process.plan(config.noise, target, measure)
    given = explicit(edges, split.blocks) if edges else None
    noise = process.make(distribution, config.noise, target)  # refuses an empty or unbounded range
    ranges = given or noise.split(split.blocks)
    return RunPlan(config, split, ranges, distribution, codebook, data.shape, settled=kind.settled)


def split_of(config: Config) -> LayerSplit:
    """Layers of each block.

    Raises:
        ConfigError: they cannot be shared so.
    """
    most = architecture(config.model.arch).most_blocks
    if most and config.blocks > most:
        raise ConfigError(
            f"blocks={config.blocks}: model.arch={config.model.arch} is one denoiser for all levels and cannot be cut "
            f"into more than {most}: set blocks={most}"
        )
    depth, sizes = config.model.depth, config.layers_per_block
    split = split_by_sizes(depth, sizes) if sizes else split_evenly(depth, config.blocks)
    if split.blocks != config.blocks:
        raise ConfigError(
            f"layers_per_block has {split.blocks} entries, and blocks={config.blocks}: give one for each block, or "
            "layers_per_block=null to share the layers evenly"
        )
    return split


def _codebook(config: Config, data: DataSet, classes: int, given: Tensor | None) -> Tensor:
    source, dim = config.codebook.source, config.codebook.dim
    if given is not None:
        if tuple(given.shape) != (classes, dim):
            raise ConfigError(
                f"init.from={config.init.source} has {len(given)} codes of {given.shape[1]} numbers, and this run "
                f"{classes} of {dim} (data.source={config.data.source}, codebook.dim={dim}): start from a run on such "
                "data, or set codebook.dim"
            )
        return given
    if source == "corpus":
        return corpus_codebook(data.train, classes, dim, config.seed)
    return make_codebook(source, classes, dim, config.seed)


def target_of(config: Config) -> Literal["noisy", "hidden"]:
    """Whether the blocks see a noisy target.

    Raises:
        ConfigError: the method is not for this architecture.
    """
    target, kind = SCHEMES[config.method].target, architecture(config.model.arch)
    if target == "hidden" and not kind.hides_target:
        raise ConfigError(
            f"method={config.method} hides the target, which only a classifier can do without: model.arch="
            f"{config.model.arch} has the baselines end_to_end, checkpointing and joint"
        )
    if SCHEMES[config.method].wrap and not kind.classifies:
        raise ConfigError(
            f"method={config.method} tries every class of a sample, and model.arch={config.model.arch} has no classes: "
            "take another baseline"
        )
    if target == "baseline":
        return "hidden" if kind.hides_target else "noisy"
    return target
