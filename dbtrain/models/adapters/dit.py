"""diffusers' DiTTransformer2DModel, cut into blocks."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.errors import ConfigError
from dbtrain.method.parametrisation import Parametrisation, VpEps
from dbtrain.models.adapters.settings import (
    fitted,
    library,
    made_of_diffusers,
    parameters_of,
    refuse_other_class,
    refuse_unknown,
)
from dbtrain.models.adapters.stack import State, Task
from dbtrain.models.adapters.timesteps import TimeSteps
from dbtrain.models.layers import picture_size

NAME = "DiTTransformer2DModel"
SCHEDULER = "scheduler"
"""Key of ours among the settings: those of the scheduler that the network was trained with."""


class DiTStack:
    """DiTTransformer2DModel of diffusers: denoises an image or latent, given its class.

    It predicts eps under Gaussian noise, and a velocity under a flow.

    It has a time of its own, the index of a DDPM's step from 0 to 999, which follows from sigma and betas.
    Each layer has an embedder of time and class. The original's head reads that of layer 0; here it reads
    that of the block's own first layer. Channels of a learned sigma are made and ignored.
    """

    original: ClassVar[str] = NAME
    package: ClassVar[str] = "diffusers"
    task: ClassVar[Task] = "denoise"
    layers: ClassVar[str] = "transformer_blocks"
    head: ClassVar[Sequence[str]] = ("norm_out", "proj_out_1", "proj_out_2")
    modulated: ClassVar[Mapping[str, int]] = {}
    depth_key: ClassVar[str] = "num_layers"
    conditions: ClassVar[Sequence[str]] = ("classes",)
    pipeline: ClassVar[Sequence[str]] = ("transformer",)
    natural_noise: ClassVar[str] = "gaussian"
    natural_parametrisation: ClassVar[str] = "vp_eps"
    noise_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        # below the first of the betas' sigmas the network has no time
        {"ranges": "paper", "weighting": "eps", "sigma_min": 0.0101}
    )

    def __init__(self, config: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
        channels, height, width = picture_size(shape["image"], NAME)
        if height != width:
            raise ConfigError(f"{NAME} is for square images, and the data has {height}x{width}: choose other data")
        told = f"images of {channels}x{height}x{width} and {shape['classes']} classes"
        wanted = {"in_channels": channels, "sample_size": height, "num_embeds_ada_norm": shape["classes"]}
        value = dict(config)
        self.steps = TimeSteps.of(value.pop(SCHEDULER, None) or {})
        self.config = fitted(value, wanted, told)
        outputs = self.config.get("out_channels") or channels
        if outputs not in (channels, 2 * channels):
            raise ConfigError(
                f"model.config.out_channels={outputs} is neither {channels}, the channels of the data, nor twice as "
                "many, which is with a learned sigma"
            )
        patch = self.config.get("patch_size", 2)
        if height % patch:
            raise ConfigError(f"model.config.patch_size={patch} does not divide the {height}x{width} image")
        self.channels = channels
        self.width = self.config.get("num_attention_heads", 16) * self.config.get("attention_head_dim", 72)

    @classmethod
    def settled(cls, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The settings as they are, and the number of layers."""
        refuse_other_class(value, source, NAME)
        kind = library("diffusers", "hf_dit").DiTTransformer2DModel
        known = {*parameters_of(kind), "_class_name", SCHEDULER}
        refuse_unknown(value, known, source, NAME)
        return {"num_layers": 28, **value}

    def build(self, layers: Sequence[int]) -> nn.Module:
        """Make the original with as many layers; labels are hidden by the run, not by each layer as it
        likes."""
        kind = library("diffusers", "hf_dit").DiTTransformer2DModel
        network: nn.Module = made_of_diffusers(kind, self.config, NAME, num_layers=len(layers))
        for layer in network.get_submodule(self.layers).children():
            layer.get_submodule("norm1.emb.class_embedder").dropout_prob = 0.0  # type: ignore[assignment]
        return network

    def additions(self) -> nn.ModuleDict:
        """None."""
        return nn.ModuleDict()

    def time(self, level: Tensor, parametrisation: Parametrisation) -> Tensor:
        """Index of the step whose sigma it is; of a flow's t in [0, 1] that share of the last index."""
        if isinstance(parametrisation, VpEps):
            return self.steps.index(level)
        return parametrisation.time(level) * (self.steps.count - 1)

    def open(self, stem: Any, given: Tensor, time: Tensor, condition: Tensor) -> State:
        """Patches (N, T, width), with time and class (N,) for every layer."""
        return {"hidden": stem.pos_embed(given), "timestep": time, "class_labels": condition}

    def layer(self, layer: Any, state: State) -> State:
        """The hidden states, and of the first layer what the head reads."""
        time, label = state["timestep"], state["class_labels"]
        hidden = layer(state["hidden"], timestep=time, class_labels=label)
        # after the layers in the original, in the type that they give
        first = state.get("first") or layer.norm1.emb
        return {**state, "hidden": hidden, "first": first}

    def close(self, stem: Any, head: Any, state: State) -> Tensor:
        """(N, C, H, W), of which a learned sigma was cut off."""
        hidden = state["hidden"]
        condition = state["first"](state["timestep"], state["class_labels"], hidden_dtype=hidden.dtype)
        shift, scale = head.proj_out_1(functional.silu(condition)).chunk(2, dim=1)
        patches = head.proj_out_2(head.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        return self._image(patches)[:, : self.channels]

    def _image(self, patches: Tensor) -> Tensor:
        """(N, T, patch * patch * C) -> (N, C, H, W), in the original's order of elements."""
        size = self.config.get("patch_size", 2)
        side = self.config["sample_size"] // size
        patches = patches.reshape(len(patches), side, side, size, size, -1)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(patches), -1, side * size, side * size)
