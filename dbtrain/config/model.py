"""Section `model`: one class an architecture."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dbtrain.config.section import Count, Positive, Section


class ViTConfig(Section):
    """Vision transformer that denoises the label's code."""

    rotary: ClassVar[bool] = False
    """Whether positions turn pairs of a head's elements, so that a head needs an even number of them."""
    noise_defaults: ClassVar[dict[str, Any]] = {}

    arch: Literal["vit"] = "vit"
    depth: Count = 6
    dim: Count = 64
    heads: Count = 4
    patch: Count = 2
    mlp_ratio: Positive = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DiTConfig(Section):
    """Diffusion transformer that denoises an image or latent, given its class."""

    rotary: ClassVar[bool] = False
    noise_defaults: ClassVar[dict[str, Any]] = {"ranges": "paper", "weighting": "edm"}
    """What `noise` is where the user says nothing: an L2 loss takes EDM's weight, and has no code to measure."""

    arch: Literal["dit"] = "dit"
    depth: Count = 6
    dim: Count = 64
    heads: Count = 4
    patch: Count = 2
    mlp_ratio: Positive = 4.0
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labels hidden in training, for classifier-free guidance."""


class MaskedLMConfig(Section):
    """Masked diffusion language model."""

    rotary: ClassVar[bool] = True
    noise_defaults: ClassVar[dict[str, Any]] = {"ranges": "alpha", "overlap": 0.0}
    """The ELBO splits exactly at the edges of the blocks."""

    arch: Literal["masked_lm"] = "masked_lm"
    depth: Count = 6
    dim: Count = 128
    heads: Count = 4
    mlp_ratio: Positive = 8 / 3
    level_dim: Count = 64
    """Width of the level's embedding."""


class RecurrentConfig(Section):
    """Recurrent-depth language model: its core is one denoiser, applied `evaluation.steps_per_block` times."""

    rotary: ClassVar[bool] = True
    noise_defaults: ClassVar[dict[str, Any]] = {"input_scaling": "signal", "overlap": 0.0}

    arch: Literal["recurrent"] = "recurrent"
    depth: Count = 2
    """Layers of the core."""
    prelude: Annotated[int, Field(ge=0)] = 1
    coda: Annotated[int, Field(ge=0)] = 1
    dim: Count = 128
    heads: Count = 4
    iterations: Count = 8
    """Of the core, in the end-to-end baseline."""
    backprop: Count = 4
    """The last iterations, through which the baseline's gradients go."""
    mlp_ratio: Positive = 8 / 3
    level_dim: Count = 64
    """Width of the level's embedding."""


class ARLMConfig(Section):
    """Autoregressive language model (Llama-style) that denoises the next token's code."""

    rotary: ClassVar[bool] = True
    noise_defaults: ClassVar[dict[str, Any]] = {"input_scaling": "signal", "overlap": 0.1}
    """Pure noise of unit variance in the stream keeps the top block from learning; the paper's overlap for text."""

    arch: Literal["ar_lm"] = "ar_lm"
    depth: Count = 6
    dim: Count = 128
    heads: Count = 4
    mlp_ratio: Positive = 8 / 3
    level_dim: Count = 64
    """Width of the level's embedding, from which every layer is modulated at every position."""
    stream: Literal["single", "concat"] = "single"
    """`single`: a slot holds a token and the noisy code of the next; `concat`: 2L slots, as in the paper."""


ModelConfig = Annotated[
    ViTConfig | DiTConfig | MaskedLMConfig | RecurrentConfig | ARLMConfig, Field(discriminator="arch")
]
