"""diffusers' WanTransformer3DModel, cut into blocks."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.method.masked_context import without_mask
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.adapters.settings import (
    fitted,
    library,
    made_of_diffusers,
    parameters_of,
    refuse_other_class,
    refuse_unknown,
)
from dbtrain.models.adapters.stack import State, Task
from dbtrain.models.layers import draw_normal
from dbtrain.models.lookup import Embedding

NAME = "WanTransformer3DModel"
STEPS = 1000
"""Number of steps by which the original counts time: t = 1 is its time 1000."""
WORDS = 2
"""Embeddings in the place of a text: of one alone attention has nothing to choose, and learns no queries."""


class WanStack:
    """WanTransformer3DModel of diffusers: denoises an image or latent by flow matching, as a velocity.

    It has a time of its own, 1000 t. An image is a video of one frame. Of data with captions it reads their
    embeddings, zeros where no token is, as diffusers' pipeline gives them. Of data with classes it reads two
    embeddings of the class instead, which are added; conditions with an image are not built.
    """

    original: ClassVar[str] = NAME
    package: ClassVar[str] = "diffusers"
    task: ClassVar[Task] = "denoise"
    layers: ClassVar[str] = "blocks"
    head: ClassVar[Sequence[str]] = ("norm_out", "proj_out", "scale_shift_table")
    modulated: ClassVar[Mapping[str, int]] = {}
    depth_key: ClassVar[str] = "num_layers"
    conditions: ClassVar[Sequence[str]] = ("classes", "text")
    inputs: ClassVar[Mapping[str, str]] = MappingProxyType({
        "classes.weight": "a row for each class, and a last one for no class, which reshaped to (2, text_dim) is its "
        "`encoder_hidden_states`, or `prompt_embeds` of a pipeline"
    })  # fmt: skip
    pipeline: ClassVar[Sequence[str]] = ("transformer", "transformer_2")
    steps: ClassVar[int] = STEPS
    natural_noise: ClassVar[str] = "flow"
    natural_parametrisation: ClassVar[str] = "flow_v"
    noise_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"ranges": "logit_normal"})

    def __init__(self, config: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
        image = tuple(shape["image"])
        self.video = len(image) == 4
        channels, frames, height, width = image if self.video else (image[0], 1, *image[1:])
        told, wanted = f"images of {'x'.join(map(str, image))}", {"in_channels": channels, "out_channels": channels}
        if "text" in shape:
            told, wanted = (
                f"{told} and embeddings of width {shape['text'][1]}",
                {**wanted, "text_dim": shape["text"][1]},
            )
        self.config = fitted(config, wanted, told)
        for key in ("image_dim", "added_kv_proj_dim"):
            if self.config.get(key) is not None:
                raise ConfigError(
                    f"model.config.{key}={self.config[key]} is of a network that reads an image beside the text, which "
                    "hf_wan does not give it: take one without"
                )
        patch = self.config.get("patch_size", (1, 2, 2))
        self.patch = tuple(patch) if isinstance(patch, (list, tuple)) else (patch,)
        whole = len(self.patch) == 3 and all(type(side) is int and side > 0 for side in self.patch)
        if not whole or frames % self.patch[0] or height % self.patch[1] or width % self.patch[2]:
            frame = "one frame" if frames == 1 else f"{frames} frames"
            raise ConfigError(
                f"model.config.patch_size={list(self.patch)} does not divide {frame} of {height}x{width}: set it to "
                "[1, SIDE, SIDE] with a SIDE that divides both"
            )
        self.classes = shape.get("classes")
        """Number of classes; None where the data has captions."""
        self.text_dim = int(self.config.get("text_dim", 4096))
        self.width = self.config.get("num_attention_heads", 40) * self.config.get("attention_head_dim", 128)

    @classmethod
    def settled(cls, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The settings as they are, and the number of layers."""
        refuse_other_class(value, source, NAME)
        kind = library("diffusers", "hf_wan").WanTransformer3DModel
        refuse_unknown(value, {*parameters_of(kind), "_class_name"}, source, NAME)
        return {"num_layers": 40, **value}

    def build(self, layers: Sequence[int]) -> nn.Module:
        """Make the original with as many layers."""
        kind = library("diffusers", "hf_wan").WanTransformer3DModel
        network: nn.Module = made_of_diffusers(kind, self.config, NAME, num_layers=len(layers), patch_size=self.patch)
        return network

    def additions(self) -> nn.ModuleDict:
        """Embeddings of the class in the place of a text's; the last are of no class. None for captions."""
        if self.classes is None:
            return nn.ModuleDict()
        table = Embedding(self.classes + 1, WORDS * self.text_dim)
        draw_normal(table.weight)
        return nn.ModuleDict({"classes": table})

    def time(self, level: Tensor, parametrisation: Parametrisation) -> Tensor:
        """1000 t."""
        return STEPS * parametrisation.time(level)

    def open(self, stem: Any, given: Tensor, time: Tensor, condition: Tensor) -> State:
        """Patches of images (N, C, H, W) or videos (N, C, F, H, W); classes (N,), or captions with their
        mask (N, L, text_dim + 1)."""
        text = self._text(stem, condition)
        video = given if self.video else given[:, :, None]
        rotary = stem.rope(video)
        hidden = stem.patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
        temb, steps, text, _ = stem.condition_embedder(time, text, None, timestep_seq_len=None)
        sizes = [size // side for size, side in zip(video.shape[2:], self.patch, strict=True)]
        constants = {"text": text, "temb": temb, "steps": steps.unflatten(1, (6, -1)), "rotary": rotary}
        return {"hidden": hidden, "sizes": sizes, **constants}

    def _text(self, stem: Any, condition: Tensor) -> Tensor:
        """What stands for a text: of a caption, zeros where the mask says that no token is."""
        if self.classes is not None:
            words: Tensor = stem.added.classes(condition).unflatten(1, (WORDS, self.text_dim))
            return words
        text, mask = without_mask(condition)
        return text * mask[..., None].to(text.dtype)

    def layer(self, layer: Any, state: State) -> State:
        """The hidden states."""
        hidden = layer(state["hidden"], state["text"], state["steps"], state["rotary"])
        return {**state, "hidden": hidden}

    def close(self, stem: Any, head: Any, state: State) -> Tensor:
        """The velocity (N, C, H, W) or (N, C, F, H, W)."""
        hidden = state["hidden"]
        shift, scale = (head.scale_shift_table + state["temb"].unsqueeze(1)).chunk(2, dim=1)
        hidden = (head.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        video = self._video(head.proj_out(hidden), state["sizes"])
        return video if self.video else video[:, :, 0]

    def _video(self, patches: Tensor, sizes: Sequence[int]) -> Tensor:
        """(N, T, elements of a patch) -> (N, C, F, H, W), in the original's order of elements."""
        patches = patches.reshape(len(patches), *sizes, *self.patch, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
