"""transformers' LlamaForCausalLM, cut into blocks: a language model that denoises the next token's code."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dbtrain.errors import ConfigError
from dbtrain.method.parametrisation import Parametrisation
from dbtrain.models.adapters.settings import library, made, made_of_transformers, refuse_unknown
from dbtrain.models.adapters.stack import State, Task

NAME = "LlamaForCausalLM"


class LlamaStack:
    """LlamaForCausalLM of transformers, as a denoiser of the next token's code.

    A slot holds the token before and the noisy code of the next, and attention is causal. The level scales
    both norms of every layer at every position. Rotary positions, and tied embeddings, are of the stem.
    """

    original: ClassVar[str] = NAME
    package: ClassVar[str] = "transformers"
    task: ClassVar[Task] = "continue"
    layers: ClassVar[str] = "model.layers"
    head: ClassVar[Sequence[str]] = ("model.norm", "lm_head")
    modulated: ClassVar[Mapping[str, int]] = {"input_layernorm": 1, "post_attention_layernorm": 1}
    depth_key: ClassVar[str] = "num_hidden_layers"
    natural_noise: ClassVar[str] = "gaussian"
    natural_parametrisation: ClassVar[str] = "logits"
    noise_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"input_scaling": "signal", "overlap": 0.1})

    def __init__(self, config: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
        self.vocabulary = int(shape["vocabulary"])
        size = config.get("vocab_size", self.vocabulary)
        if size < self.vocabulary:
            raise ConfigError(
                f"model.config.vocab_size={size} is below the {self.vocabulary} tokens of the data: take the tokenizer "
                f"that the network was trained with, or set model.config.vocab_size={self.vocabulary}"
            )
        self.config = {**config, "vocab_size": size}
        settings = self._made()
        self.width, self.tied = int(settings.hidden_size), bool(settings.tie_word_embeddings)
        # only what the settings say themselves: the library's default is a letter of a small vocabulary
        first = self.config.get("bos_token_id")
        self.has_start = isinstance(first, int) and 0 <= first < self.vocabulary
        self.start_token = int(str(first)) if self.has_start else self.vocabulary

    def _made(self) -> Any:
        return made_of_transformers(library("transformers", "hf_llama").LlamaConfig, self.config, NAME)

    @classmethod
    def settled(cls, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The settings as they are, and the number of layers."""
        kind = library("transformers", "hf_llama").LlamaConfig
        value = dict(value)
        if "_class_name" in value or value.pop("model_type", "llama") != "llama":
            raise ConfigError(f"{source} is of another class than {NAME}: give the config.json of one")
        value.pop("architectures", None)
        refuse_unknown(value, {*kind().to_dict(), "rope_theta", "rope_scaling"}, source, NAME)
        return {"num_hidden_layers": kind().num_hidden_layers, **value}

    def build(self, layers: Sequence[int]) -> nn.Module:
        """Make the original with as many layers; tied embeddings are kept once, as those of the stem."""
        config = self._made()
        config.num_hidden_layers = len(layers)
        network: nn.Module = made(library("transformers", "hf_llama").LlamaForCausalLM, config, NAME)
        if self.tied:
            del network.lm_head
        return network

    def additions(self) -> nn.ModuleDict:
        """What stands before the first token, where the settings name no token for it."""
        if self.has_start:
            return nn.ModuleDict()
        start = nn.Embedding(1, self.width)
        nn.init.normal_(start.weight, std=0.02)
        return nn.ModuleDict({"start": start})

    def time(self, level: Tensor, parametrisation: Parametrisation) -> Tensor:
        """c_noise of the parametrisation."""
        return parametrisation.time(level)

    def open(self, stem: Any, given: Tensor, time: Tensor, condition: Tensor) -> State:
        """Tokens (N, T) and what their codes add (N, T, width), with the rotary tables of the positions."""
        hidden = self._embedded(stem, condition) + given
        positions = torch.arange(condition.shape[1], device=condition.device)[None]
        return {"hidden": hidden, "rotary": stem.model.rotary_emb(hidden, position_ids=positions)}

    def _embedded(self, stem: Any, tokens: Tensor) -> Tensor:
        if self.has_start:
            found: Tensor = stem.model.embed_tokens(tokens)
            return found
        begins = tokens == self.start_token
        found = stem.model.embed_tokens(tokens.masked_fill(begins, 0))
        return torch.where(begins[..., None], stem.added.start(torch.zeros_like(tokens)), found)

    def unread(self, name: str) -> bool:
        """Whether a tensor of a file is no parameter: old rotary tables, or a readout that is tied."""
        return name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight")

    def layer(self, layer: Any, state: State) -> State:
        """The hidden states; without a mask attention is causal."""
        out = layer(state["hidden"], position_embeddings=state["rotary"], **state["told"])
        return {**state, "hidden": out[0] if isinstance(out, tuple) else out}

    def close(self, stem: Any, head: Any, state: State) -> Tensor:
        """Logits (..., V) of the tokens that the data has."""
        hidden = head.model.norm(state["hidden"])
        if self.tied:
            return functional.linear(hidden, stem.model.embed_tokens.weight)[..., : self.vocabulary]
        logits: Tensor = head.lm_head(hidden)
        return logits[..., : self.vocabulary]
