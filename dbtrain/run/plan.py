"""How a run's manifest becomes models: the one place where configuration turns into the plain values of the
method."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.config import Config, parse_config
from dbtrain.config.data import absolute_paths, named_places, whereabouts
from dbtrain.data.registry import MAPS_TENSORS, READS_TENSORS, load
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError, DataError
from dbtrain.method.draws import derive_seed
from dbtrain.method.gaussian import NoNoise
from dbtrain.method.interface import BlockModel, NoiseProcess, Target
from dbtrain.method.loops import order
from dbtrain.method.noise_processes import noise_process
from dbtrain.method.objective import Slice
from dbtrain.method.parametrisation import PARAMETRISATIONS, Parametrisation, Unseen, default_sigma_data
from dbtrain.method.ranges import Ranges
from dbtrain.method.schemes import SCHEMES, Scheme
from dbtrain.method.split import LayerSplit
from dbtrain.models.adapters.names import is_added
from dbtrain.models.layers import recompute
from dbtrain.models.registry import architecture, own_architecture
from dbtrain.run.schedule import Schedule, schedule_of
from dbtrain.shards.extension import Extension
from dbtrain.shards.foreign_tensors import map_tensors, read_tensors
from dbtrain.shards.manifest import Manifest
from dbtrain.shards.origin import Origin

SHOWN = 16
"""Digits of a hash that a message gives."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that is settled before training, from which any worker builds its own block.

    `shard` is the number of the job that writes shards: the block, or 0 where one job trains all blocks.
    """

    config: Config
    split: LayerSplit
    ranges: Ranges
    distribution: Mapping[str, Any]
    """Kind and numbers of the level distribution, as stored in run.json; kind ``none`` for end-to-end."""
    codebook: Tensor | None
    shape: Mapping[str, Any]
    """What the data tells the model: image shape, number of classes."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where the run found the relative paths of its data when it was started."""
    data_hash: str = ""
    """Hash of the data's content when the run was started; '' in a run from before it was recorded."""
    class_names: tuple[str, ...] = ()
    """Names of the data's classes, in the order of their numbers; empty if they have none."""
    data_notes: tuple[str, ...] = ()
    """What people should be told of the data."""
    init: Origin | None = None
    """Where the first weights come from; None where they are random."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the architecture that the run settled when it began;
    empty in a run from before there were any."""
    extensions: tuple[Extension, ...] = ()
    """How the run became longer than it was prepared."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the parts that no block trains, by their names in a block's model."""

    def noise(self) -> NoiseProcess:
        """The noise process over the whole range."""
        kind = architecture(self.config.model.arch)
        if self.distribution["kind"] == "none":
            return NoNoise(kind.per_position, kind.baseline_spread)
        return noise_process(self.config.noise_process).make(self.distribution, self.config.noise, self._target())

    @cached_property
    def level_name(self) -> str:
        """What the levels of the run are called."""
        return self.noise().level_name

    def parametrisation(self) -> Parametrisation:
        """What the networks of the run are given and what their outputs mean."""
        noise = self.config.noise
        if self.distribution["kind"] == "none":
            return Unseen()
        sigma_data = noise.sigma_data or default_sigma_data(self._target().code_dim)
        natural = architecture(self.config.model.arch).natural_parametrisation
        name = noise_process(self.config.noise_process).parametrisations.get(natural, natural)
        return PARAMETRISATIONS[name](sigma_data, noise.input_scaling)

    def _target(self) -> Target:
        return noise_target(self.config, self.shape, self.codebook)

    @property
    def architecture_hash(self) -> str:
        """Hash (16 hexadecimal digits) of what gives a weight its meaning: the network, how its blocks depend
        on each other, and its scales."""
        config = self.config
        scales = config.noise.model_dump(mode="json", include={"sigma_data", "input_scaling"})
        if config.noise_process != config.natural_process:  # else hashes of older shards would change
            scales["process"] = config.noise_process
        content: dict[str, Any] = {"model": config.model.content(), "method": config.method, "noise": scales}
        content["shape"] = dict(self.shape)
        own = own_architecture(config.model.arch)
        if own:
            content["code"] = own.content_hash
        if self.settled:  # else hashes of the shards of older runs would change
            content["settled"] = dict(self.settled)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def scheme(self) -> Scheme:
        """How the blocks depend on each other."""
        return SCHEMES[self.config.method]

    @property
    def shards(self) -> LayerSplit:
        """Layers of each shard: one per block, or a single one where one job trains all blocks."""
        return self.scheme.shards(self.split)

    def levels(self, shard: int) -> tuple[float, float]:
        """(low, high) that the shard owns, without `noise.overlap`; what it trains on is `Ranges.widened`."""
        return (self.ranges.edges[-1], self.ranges.edges[0]) if self.scheme.shared else self.ranges.of(shard)

    def runs(self, block: int) -> tuple[int, ...]:
        """Layers that one evaluation of a block applies, in order; a looped one is there more than once."""
        return self._order(self.scheme.runs(self.split, block))

    def applied(self, shard: int) -> tuple[int, ...]:
        """Layers that one training step of a shard applies, in order."""
        return self._order(self.scheme.runs(self.shards, shard))

    def shape_of(self, shard: int) -> Hashable:
        """A key that is equal for two shards whose workers need the same memory and arithmetic."""
        layers, training = self.applied(shard), self.config.training.of_block(shard)
        settings = training.model_dump_json(exclude={"steps", "blocks"})
        # a block that is trained after others has frozen layers, and their number depends on its place
        place = shard if self.scheme.in_turn else None
        return tuple(layer - layers[0] for layer in layers), settings, place

    def _order(self, layers: range) -> tuple[int, ...]:
        # each block by itself, because no group of looped layers crosses a boundary
        first, after = (bisect_left(self.split.bounds, end) for end in (layers.start, layers.stop))
        blocks = map(self.split.layers, range(first, after))
        return tuple(layer for own in blocks for layer in order(own, self.config.model.loops))

    def model(self, shard: int, device: str = "cpu") -> BlockModel:
        """The model with the layers that a shard's job runs, initialised as a function of (seed, shard).

        The shard is the block, except where one job trains all blocks.
        """
        kind, scheme = architecture(self.config.model.arch), self.scheme
        arguments = self.config.model.arguments() | dict(self.settled)
        arguments |= kind.from_shape(self.shape)
        if kind.codes:
            arguments["codebook"] = self.codebook
        layers = scheme.runs(self.shards, shard)
        build = kind.baseline if self.config.method == "end_to_end" else kind
        noise = self.noise()  # made outside of the device's context, because numbers in it are read
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(derive_seed(self.config.seed, "init", shard))
            model = build(noise=noise, parametrisation=self.parametrisation(), layers=layers, **arguments)
        self._freeze(model)
        if scheme.wrap is None:
            return model
        return scheme.wrap(model, [self._order(self.split.layers(block)) for block in range(self.split.blocks)])

    @torch.no_grad()
    def _freeze(self, model: BlockModel) -> None:
        """Take the frozen parts out of training, with their weights where these are known already."""
        for name, parameter in model.named_parameters():
            # what was added to another library's stem is new, and learned by every block
            if name.split(".", 1)[0] not in self.config.init.frozen or is_added(name):
                continue
            parameter.requires_grad_(False)
            if name in self.frozen and not parameter.is_meta:
                parameter.copy_(self.frozen[name])

    def objective(self, shard: int, device: str = "cpu") -> nn.Module:
        """What a worker of this shard trains: (batch, key, positions) -> loss."""
        model = self.model(shard, device)
        if self.config.training.activation_checkpointing:
            recompute(model)
        return self.scheme.objective(model, self._slices, shard, self.config.training.precision)

    def schedule(self, shard: int) -> Schedule:
        """The learning rate that a shard is trained with, over all its steps; the same for every method."""
        return schedule_of(self.config.training, self.extensions, shard)

    @cached_property
    def _slices(self) -> tuple[Slice, ...]:
        """What each block trains. They are made once: made anew for each block, a thousand blocks would make
        a million."""
        overlap, noise = self.config.noise.overlap, self.noise()

        def share(block: int) -> float:
            low, high = noise.cdf(torch.tensor(self.ranges.of(block), dtype=torch.float64)).tolist()
            return float(high - low)

        blocks = range(self.split.blocks)
        return tuple(Slice(self.runs(b), *self.ranges.widened(b, overlap), share(b)) for b in blocks)

    def data(self) -> DataSet:
        """Load the data set, and make sure that it is the one that the run was started with.

        Raises:
            DataError: it is missing, damaged, does not hold what it should,
                or holds something else than at the start.
        """
        try:
            data = load_data(self.located())
        except DataError as error:
            raise DataError(f"{error}{whereabouts(self.config.data, self.paths)}") from error
        # else a block would train on other samples than its neighbours, and a test score could come from
        # samples that were trained on
        if self.data_hash and data.content != self.data_hash:
            raise DataError(
                f"the data is not what run {self.config.name} was started with: {named_places(self.located().data)} "
                f"holds {data.content[:SHOWN]}, run.json says {self.data_hash[:SHOWN]}: restore it, or start another "
                "run (name=...)"
            )
        return data

    def located(self) -> Config:
        """The configuration with the paths of its data where they are for this process."""
        return self.config.model_copy(update={"data": absolute_paths(self.config.data, self.paths)})


def load_data(config: Config) -> DataSet:
    """The data set of a configuration.

    Raises:
        DataError: it is missing, damaged or does not hold what it should.
    """
    arguments = config.data.model_dump(exclude={"source"})
    if config.data.source in READS_TENSORS:
        arguments["read"] = map_tensors if config.data.source in MAPS_TENSORS else read_tensors
    return load(config.data.source, arguments)


def noise_target(config: Config, shape: Mapping[str, Any], codebook: Tensor | None) -> Target:
    """What the run makes noisy."""
    arch, kind = config.model.arch, architecture(config.model.arch)
    code_dim = None if codebook is None else codebook.shape[1]
    return Target(arch, kind.noised, shape, code_dim, kind.per_position)


def level_name(manifest: Manifest) -> str:
    """What the levels of a run are called, from its manifest alone."""
    if manifest.noise["kind"] == "none":
        return NoNoise.level_name
    config = manifest.config
    # if the user chose none, it is the architecture's own
    name = config["noise"].get("process") or architecture(config["model"]["arch"]).natural_noise
    return noise_process(name).level_name


def read_plan(
    manifest: Manifest, codebook: Tensor | None, frozen: Mapping[str, Tensor] = MappingProxyType({})
) -> RunPlan:
    """The plan of a run from its manifest, and what it keeps beside it for all blocks.

    Raises:
        ConfigError: the run's own class of network cannot be imported here, or is not what it was.
    """
    # where one job trains all blocks, the plan has one row and the blocks have their own
    rows = manifest.slices or manifest.plan
    bounds = [row.layers[0] for row in rows] + [rows[-1].layers[1]]
    shape = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest.shape.items()}
    config = parse_config(dict(manifest.config), "run.json")
    _refuse_changed(config, manifest.model_hash)
    return RunPlan(
        config=config,
        split=LayerSplit(tuple(bounds)),
        ranges=Ranges.from_hex([*(row.levels[1] for row in rows), rows[-1].levels[0]]),
        distribution=manifest.noise,
        codebook=codebook,
        shape=shape,
        paths=manifest.data_paths,
        data_hash=manifest.data_hash,
        class_names=manifest.class_names,
        data_notes=manifest.data_notes,
        init=manifest.init,
        settled=manifest.settled,
        extensions=manifest.extensions,
        frozen=frozen,
    )


def _refuse_changed(config: Config, expected: str) -> None:
    """Refuse a network whose code was changed, in which the same weights may mean something else."""
    own = own_architecture(config.model.arch)
    if own is None or own.content_hash == expected:
        return
    raise ConfigError(
        f"{own.file} (model.arch={config.model.arch}) is not what run {config.name} was started with: it holds "
        f"{own.content_hash[:SHOWN]}, run.json says {expected[:SHOWN]}: put the file back as it was, or start another "
        "run (name=...)"
    )
