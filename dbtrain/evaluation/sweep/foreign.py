"""Hidden states of a causal language model in a Hugging Face folder on this machine."""

from pathlib import Path
from typing import Any

import torch

from dbtrain.errors import ConfigError, first_line
from dbtrain.evaluation.sweep.concepts import ConceptSet
from dbtrain.evaluation.sweep.geometry import Floats
from dbtrain.evaluation.sweep.hidden import States, same_length, stacked


class SweptFolder:
    """A causal language model of `transformers`, from a folder: no network, no pickle, no code of its own.

    Layer 0 is the embedding.

    Args:
        folder: folder with config.json, safetensors weights and the tokenizer's files.

    Raises:
        ConfigError: transformers is not installed, or the folder holds no such model with safetensors weights
            and its tokenizer.
    """

    weights = ""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ModuleNotFoundError:
            raise ConfigError(
                f"{folder} is a Hugging Face folder, which needs transformers: pip install transformers"
            ) from None
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
            self.model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"{folder} holds no causal language model that transformers reads ({first_line(error)}): it needs "
                "config.json, safetensors weights and the tokenizer's files"
            ) from None
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.name = folder.resolve().name
        self.layers = list(range(int(self.model.config.num_hidden_layers) + 1))

    @torch.no_grad()
    def states(self, concepts: ConceptSet) -> States:
        """One forward pass for each prompt, with all hidden states, at its last token."""
        prompts = concepts.prompts()
        tokens = [self.tokenizer(text)["input_ids"] for _, _, text in prompts]
        hidden: dict[int, Floats] = {}
        chances: dict[int, Floats] = {}
        for numbers in same_length(tokens):
            read = torch.tensor([tokens[n] for n in numbers], device=self.model.device)
            given = self.model(input_ids=read, output_hidden_states=True, use_cache=False)
            states = torch.stack([layer[:, -1] for layer in given.hidden_states], dim=1).double().cpu().numpy()
            output = given.logits[:, -1].float().softmax(dim=-1).double().cpu().numpy()
            for place, number in enumerate(numbers):
                hidden[number], chances[number] = states[place], output[place]
        return stacked(hidden, chances, prompts)

    def first_tokens(self, concepts: ConceptSet) -> list[int]:
        """The first token of each label after a space."""
        return [int(self.tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0]) for label in concepts.labels]
