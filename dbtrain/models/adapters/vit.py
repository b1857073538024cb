"""transformers' ViTForImageClassification, cut into blocks: a classifier that denoises the label's code."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.adapters.settings import fitted, library, made, made_of_transformers, refuse_unknown
from dbtrain.models.adapters.stack import NO_DEFAULTS, State, Task
from dbtrain.models.layers import picture_size

NAME = "ViTForImageClassification"
OLD_LIST, NEW_LIST = "vit.encoder.layer", "vit.layers"
"""What the list of layers is called up to transformers 4, in its files of all versions, and from 5 on."""
RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
"""Modules of a layer as files and transformers 4 call them, and as transformers 5 does."""


@lru_cache
def _is_old() -> bool:
    """Whether the installed transformers is of the time before 5."""
    try:
        return int(version("transformers").split(".")[0]) < 5
    except PackageNotFoundError:
        return False


class _ListOfLayers:
    """The list's name in the installed transformers."""

    def __get__(self, instance: object, owner: type) -> str:
        return OLD_LIST if _is_old() else NEW_LIST


class ViTStack:
    """ViTForImageClassification of transformers, as a denoiser of the label's code.

    The noisy code is added to the class token, and the level scales and shifts both norms of every layer.
    """

    original: ClassVar[str] = NAME
    package: ClassVar[str] = "transformers"
    task: ClassVar[Task] = "classify"
    layers: ClassVar[Any] = _ListOfLayers()
    head: ClassVar[Sequence[str]] = ("vit.layernorm", "classifier")
    modulated: ClassVar[Mapping[str, int]] = {"layernorm_before": 2, "layernorm_after": 2}
    depth_key: ClassVar[str] = "num_hidden_layers"
    natural_noise: ClassVar[str] = "gaussian"
    natural_parametrisation: ClassVar[str] = "logits"
    noise_defaults: ClassVar[Mapping[str, Any]] = NO_DEFAULTS

    def __init__(self, config: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
        channels, height, width = picture_size(shape["image"], NAME)
        told = f"images of {channels}x{height}x{width} and {shape['classes']} classes"
        size = height if height == width else [height, width]
        wanted = {"num_channels": channels, "image_size": size, "num_labels": shape["classes"]}
        self.config = fitted(config, wanted, told)
        self.width = int(self._made().hidden_size)

    def _made(self) -> Any:
        return made_of_transformers(library("transformers", "hf_vit").ViTConfig, self.config, NAME)

    @classmethod
    def settled(cls, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The settings without the names of classes, which are the data's."""
        kind = library("transformers", "hf_vit").ViTConfig
        value = dict(value)
        if "_class_name" in value or value.pop("model_type", "vit") != "vit":
            raise ConfigError(f"{source} is of another class than {NAME}: give the config.json of one")
        names = value.pop("id2label", None)
        value.pop("label2id", None), value.pop("architectures", None)
        if names is not None:
            if not isinstance(names, Mapping):
                raise ConfigError(f"{source}: id2label={names} must map numbers to the names of classes")
            value["num_labels"] = len(names)
        refuse_unknown(value, {*kind().to_dict(), "num_labels"}, source, NAME)
        return {"num_hidden_layers": kind().num_hidden_layers, **value}

    def build(self, layers: Sequence[int]) -> nn.Module:
        """Make the original with as many layers; its masked token and pooler are never made."""
        config = self._made()
        config.num_hidden_layers = len(layers)
        network: nn.Module = made(library("transformers", "hf_vit").ViTForImageClassification, config, NAME)
        return network

    def additions(self) -> nn.ModuleDict:
        """None but those of every classifier."""
        return nn.ModuleDict()

    def time(self, level: Tensor, parametrisation: Parametrisation) -> Tensor:
        """c_noise of the parametrisation."""
        return parametrisation.time(level)

    def open(self, stem: Any, given: Tensor, time: Tensor, condition: Tensor) -> State:
        """Patches and the class token (N, 1 + T, width), to which the code's (N, width) is added."""
        hidden = stem.vit.embeddings(condition)
        return {"hidden": torch.cat([hidden[:, :1] + given[:, None], hidden[:, 1:]], dim=1)}

    def layer(self, layer: Any, state: State) -> State:
        """The hidden states."""
        out = layer(state["hidden"], **state["told"])
        # before transformers 4.5x a layer gave a tuple
        return {**state, "hidden": out[0] if isinstance(out, tuple) else out}

    def close(self, stem: Any, head: Any, state: State) -> Tensor:
        """Logits (N, classes), of the class token."""
        logits: Tensor = head.classifier(head.vit.layernorm(state["hidden"])[:, 0, :])
        return logits

    @staticmethod
    def from_file(name: str) -> str:
        """The original's name of a tensor in a file, where all versions write the names of transformers 4."""
        if _is_old() or not name.startswith(f"{OLD_LIST}."):
            return name
        number, _, rest = name.removeprefix(f"{OLD_LIST}.").partition(".")
        for old, new in RENAMED:
            if rest.startswith(f"{old}."):
                return f"{NEW_LIST}.{number}.{new}.{rest.removeprefix(f'{old}.')}"
        return f"{NEW_LIST}.{number}.{rest}"
