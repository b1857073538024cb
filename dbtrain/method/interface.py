"""The plug: what an architecture (`BlockModel`) and a noise process (`NoiseProcess`, `NoiseKind`) must offer.

A model has exactly these parameter groups: ``stem.*``, ``layers.<i>.*`` with i numbered over the whole model,
and ``head.*``. Split and merge know only names. The codebook is common to all blocks and no parameter: it is
a buffer with ``persistent=False``, because it is stored once beside the blocks and never in a shard.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.method.ranges import Ranges

Batch = Mapping[str, Tensor]
"""Named tensors of N samples, for instance ``image`` (N, C, H, W) and ``label`` (N,)."""


@dataclass(frozen=True)
class Example:
    """A batch in the terms of the method."""

    clean: Tensor
    """What is noised: (N, ..., D) codes, images or latents, or (N, L) token ids."""
    context: Tensor
    """What every block may see at any level, (N, ...)."""
    target: Tensor
    """What the loss compares with: class indices, token ids, or the clean image."""


Noised = Literal["vectors", "tokens"]
"""What is made noisy: codes, images or latents; or token ids."""
Likelihood = Literal["next_token", "elbo"]
"""The outputs are logits of the next token at each position; or they bound the likelihood of a whole text."""
Continuation = Literal["cached", "uncached", "unmasking"]
"""Token by token with a `CachedModel`'s cache or without; or by filling in masks."""


class NoiseProcess(Protocol):
    """A family of corruptions ordered by a level: sigma for Gaussian noise, the masked share for masking."""

    level_name: str
    """What its levels are called in tables and messages, such as `sigma`."""

    def level_shape(self, example: Example) -> tuple[int, ...]:
        """Shape of the levels of one sample: () for one level a sample, (L,) for one a position."""

    def draw_uniforms(self, example: Example, draws: Draws) -> Tensor:
        """Uniforms in (0, 1), (N, *level_shape), which say where in the slice the levels of a step lie."""

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training levels at or below `level`, in [0, 1], float64."""

    def quantile(self, share: Tensor) -> Tensor:
        """Levels below which these shares of the training levels lie,
        float32, same shape: the inverse of `cdf`."""

    def split(self, blocks: int) -> Ranges:
        """Slices of its whole range, one a block, of equal shares of what is to be learned."""

    def schedule(self, ranges: Ranges, steps_per_block: int) -> list[float]:
        """Falling levels of a sampler with as many steps in every slice;
        see `schedule` in method/sampler.py."""

    def whole_schedule(self, ranges: Ranges, steps: int) -> list[float]:
        """Falling levels of a sampler from the top of the whole range, spaced without regard to slices."""

    def in_other_terms(self, low: float, high: float) -> str:
        """A slice of levels in other words for people, such as a flow's in sigma; '' if there are none."""

    def corrupt(self, clean: Tensor, level: Tensor, draws: Draws) -> Tensor:
        """The noisy target at `level`; same leading shape as `clean`."""

    def weight(self, level: Tensor) -> Tensor:
        """Loss weight, same shape as `level`."""

    def prior(self, shape: tuple[int, ...], draws: Draws) -> Tensor:
        """Pure noise (N, *shape), where generation starts."""

    def centre(self, prior: Tensor) -> Tensor:
        """The middle of what `prior` draws from, a start without chance."""

    def step(self, noisy: Tensor, denoised: Tensor, level: Tensor, next_level: Tensor, draws: Draws) -> Tensor:
        """One step of the sampler from `level` down to `next_level`; down to 0 it gives the sample itself."""


@dataclass(frozen=True)
class Target:
    """What a run makes noisy, as far as a noise process asks."""

    arch: str
    """The architecture's name, for messages."""
    noised: Noised
    shape: Mapping[str, Any]
    """What the data tells the model: image shape, number of classes, vocabulary."""
    code_dim: int | None
    """Width of the codes; None without a codebook."""
    per_position: bool
    """Whether each position of a sample has a level of its own."""


class NoiseSettings(Protocol):
    """What a noise process reads of the configuration's section `noise`."""

    @property
    def ranges(self) -> str:
        """One of the process's policies."""

    p_mean: float
    p_std: float
    sigma_min: float
    sigma_max: float
    sigma_data: float | None
    edges: tuple[float, ...] | None
    weighting: Literal["none", "edm", "clamp", "eps"]
    input_scaling: Literal["unit", "signal"]
    shift: float
    logit_mean: float
    logit_std: float


class NoiseKind(Protocol):
    """A row of `NOISE_PROCESSES`: the class of a noise process."""

    level_name: str
    noises: Noised
    policies: tuple[str, ...]
    """Values of `noise.ranges` that it knows, the default first. One that is measured (`calibrated`,
    `equal_information`) needs `uniform` beside it, which stands in where nothing is measured."""
    own_settings: tuple[str, ...]
    """Keys of the section `noise` that no other process reads."""
    parametrisations: Mapping[str, str]
    """Rows of `PARAMETRISATIONS` that take the place of an architecture's own, where this process's levels
    are no sigmas; what is not in it stays."""

    def plan(
        self, settings: NoiseSettings, target: Target, measure: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Distribution of the levels, as it is stored in run.json: a mapping with `kind` and its numbers.

        `read_distribution` in method/levels.py reads the kinds that exist already. The kind `none` is
        reserved for runs whose networks are shown no noise.

        Args:
            settings: the section `noise` of the run.
            target: what is made noisy.
            measure: trains a pilot on the data, for the policies that calibrate the range.

        Raises:
            ConfigError: the settings are not for this process.
        """

    def make(self, spec: Mapping[str, Any], settings: NoiseSettings, target: Target) -> NoiseProcess:
        """The process over the whole range, from what `plan` gave."""


class BlockModel(nn.Module, ABC):
    """An architecture. An instance holds all layers or only those of one block.

    The layers that it holds are in ``self.layers`` under their numbers in the whole model. What the class can
    do and what it takes is said by its attributes: metrics and commands follow from them, and nothing asks
    for its name. Its constructor takes keywords: ``noise``, ``parametrisation``, ``layers`` (numbers of those
    that it holds, None for all), ``codebook`` if it has `codes`, what it `takes` of the data's shape, and the
    keys of the configuration's section ``model``, of which ``depth`` is the number of layers.
    """

    codes: ClassVar[str | None] = None
    """Entry of the data's shape that says how many codes the codebook has; None without a codebook."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Entries of the data's shape that the constructor takes."""
    may_take: ClassVar[tuple[str, ...]] = ()
    """Entries that it takes, with a default, where the data has them, such as classes or captions."""
    noised: ClassVar[Noised] = "vectors"
    """What is made noisy."""
    natural_noise: ClassVar[str] = "gaussian"
    """The noise process that it is made for: a row of `NOISE_PROCESSES`;
    `noise.process` may choose another."""
    noise_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Values of the section `noise` under that process, where the user says nothing."""
    natural_parametrisation: ClassVar[str] = "logits"
    """What its input, output and time are: a row of `PARAMETRISATIONS`."""
    per_position: ClassVar[bool] = False
    """Whether each position of a sample has a noise level of its own."""
    most_blocks: ClassVar[int | None] = None
    """The most blocks that it can be cut into; None for any number."""

    classifies: ClassVar[bool] = False
    """Its outputs are logits of the data's classes."""
    samples: ClassVar[str | None] = None
    """Entry of the data's shape that a sample drawn from noise has; None if there is nothing to draw."""
    likelihood: ClassVar[Likelihood | None] = None
    """What its outputs say of the likelihood of a text; None if they say nothing of it."""
    continues: ClassVar[Continuation | None] = None
    """How it continues a text; None if it does not."""

    settled: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Values of the arguments marked `FromRun` in a new run, which keeps them in run.json. A run that was
    prepared before such an argument existed takes the constructor's default. So a better value for new
    networks does not change a network that is trained already."""

    hides_target: ClassVar[bool] = False
    """Whether it can learn without seeing its target. Its end-to-end baseline then does so; the baseline of
    any other class denoises in one block."""
    baseline_spread: ClassVar[float] = 0.0
    """Standard deviation of the noise that the baseline starts from, for a class that sets `hides_target`."""

    stack: ClassVar[Any] = None
    """How the class of another library that this one is made of is cut (`Stack` in
    models/adapters/stack.py); None for a network of our own."""

    @classmethod
    def completed(cls, keys: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keys of the section `model` with what follows from them, as run.json keeps them.

        Raises:
            ConfigError: they name something that is not there, or is for another class.
        """
        return keys

    @classmethod
    def from_shape(cls, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the constructor that follow from the data's shape.

        Raises:
            KeyError: the shape lacks an entry that it `takes`.
        """
        names = (*cls.takes, *(name for name in cls.may_take if name in shape))
        return {name: shape[name] for name in names}

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Refuse keys of the section `model`, or `loops`, that do not fit, before any data is read.

        Raises:
            ConfigError: they do not.
        """

    @classmethod
    def baseline(cls, **arguments: Any) -> "BlockModel":
        """The end-to-end baseline, from the arguments of the constructor."""
        return cls(**arguments)

    num_layers: int
    """Layers of the whole model."""
    noise: NoiseProcess
    """How the target is made noisy; the run's."""
    parametrisation: Parametrisation
    """What the network is given and what its output means; the network's own."""
    layers: nn.ModuleDict

    @abstractmethod
    def example(self, batch: Batch, draws: Draws | None = None) -> Example:
        """Read a batch in the terms of the method.

        `draws` are those of a training step, for what is dropped from the context
        at random (from a stream of its own); None when nothing may be dropped.
        """

    @abstractmethod
    def predict(self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Stem, then only these layers, then head: logits, or the denoised image.

        Args:
            layers: numbers of the layers to apply, in this order; a looped one is there more than once.
            noisy: the noisy target, in the shape of ``Example.clean``.
            level: (N, *level_shape).
            context: `Example.context` of the samples.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Unweighted loss, in the shape of the levels: (N,) or (N, L)."""

    def predict_loss(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, target: Tensor
    ) -> Tensor:
        """Unweighted loss of what `predict` gives, float32, in the shape of the levels: what is trained.

        An architecture with very many outputs may compute it piece by piece.
        """
        output = self.predict(layers, noisy, level, context)
        with torch.autocast(noisy.device.type, enabled=False):
            return self.loss(output.float(), target)

    def compile_parts(self) -> None:
        """Compile parts that must stay outside of the one graph of a compiled step; none by default."""

    @abstractmethod
    def denoised(self, output: Tensor) -> Tensor:
        """The output in the diffused space: codes or images like `clean`;
        of token ids, (N, L, V) probabilities."""

    def unconditional(self, context: Tensor) -> Tensor:
        """The context that tells nothing, same shape: what classifier-free guidance needs.

        Raises:
            ConfigError: the architecture was never trained with its context hidden.
        """
        raise ConfigError(f"guidance needs a model that is trained without its context too, and {_name(self)} is not")

    def open(self, noisy: Tensor, level: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer takes, a hidden state and a condition;
        each layer makes the next one's hidden state.

        Only for architectures whose layers are trained by their own activity (Forward-Forward).

        Raises:
            ConfigError: the architecture does not show its hidden states.
        """
        raise ConfigError(f"method=forward_forward looks at hidden states, and {_name(self)} does not show them")


def _name(model: BlockModel) -> str:
    return type(model).__name__


@runtime_checkable
class CachedModel(Protocol):
    """What a model offers in addition if it continues a text with a cache of earlier positions."""

    start_token: int
    """Token that stands before the first token of a text."""

    def new_cache(self) -> Any:
        """An empty cache, of one evaluation along the chain."""

    def predict(
        self, layers: Sequence[int], noisy: Tensor, level: Tensor, context: Tensor, cache: Any = None
    ) -> Tensor:
        """`BlockModel.predict` for the positions after those in the cache; they are added to the cache."""

    def denoised(self, output: Tensor) -> Tensor:
        """The same as `BlockModel.denoised`."""
