"""A causal language model that others trained, from a folder,
which reads texts: their perplexity and features."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dbtrain.errors import ConfigError, first_line


class Judge:
    """Reads texts one by one with a language model of Hugging Face.

    Raises:
        ConfigError: the folder holds no causal language model with its tokenizer.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except Exception as error:
            raise ConfigError(
                f"evaluation.judge={folder!r} cannot be read as a causal language model of Hugging Face with "
                f"safetensors and its tokenizer ({first_line(error)}); it also needs the extra packages of "
                "dbtrain[text]"
            ) from error
        self.folder = folder
        self._device = device
        # transformers 5 keeps the precision of the file, and version 4 read it as float32: without this the
        # score would depend on the version
        self._model = model.to(device, torch.float32).eval()

    def _ids(self, text: str) -> Tensor:
        ids = cast(Tensor, self._tokenizer(text, return_tensors="pt")["input_ids"]).to(self._device)
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most is not None and ids.shape[1] > most:
            raise ConfigError(
                f"evaluation.judge={self.folder!r} reads at most {most} tokens, and a text has {ids.shape[1]} of its "
                "tokens: choose a judge that reads more, or train with a shorter data.length"
            )
        return ids

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str]) -> float:
        """exp of the mean cross-entropy, in nats for each
        of the judge's own tokens after the first of a text.

        Raises:
            ConfigError: no text has two tokens, or one has more than the judge reads.
        """
        nats, tokens = 0.0, 0
        for ids in map(self._ids, texts):
            if ids.shape[1] > 1:
                nats += float(self._model(ids, labels=ids).loss) * (ids.shape[1] - 1)
                tokens += ids.shape[1] - 1
        if not tokens:
            raise ConfigError(f"evaluation.judge={self.folder!r} finds no two tokens in any text: choose another judge")
        return math.exp(nats / tokens)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """The last layer's output at the last token of each text,
        (texts, width)  # Pillutla et al. 2021, section 3.

        Raises:
            ConfigError: a text has more tokens than the judge reads.
        """
        outputs = [self._model(self._ids(text), output_hidden_states=True).hidden_states[-1] for text in texts]
        return torch.stack([output[0, -1].float().cpu() for output in outputs])


def hash_of(folder: str) -> str:
    """SHA-256 of a judge's weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
