"""Bits per character of an autoregressive language model: a likelihood,
whose noisy codes know nothing of the text."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import Split, evenly
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.telemetry.counting import counted

MOST_LOGITS = 1 << 26
"""Logits of one evaluation that are held at once; a larger batch is cut."""


def bits(model: MergedModel, split: Split, section: EvaluationConfig) -> dict[str, float]:
    """Bits a character by readout: ``first``, ``chain``, ``mean`` and ``after_<block>``.

    Every code that a block sees is made from the prior and the blocks before it, never from the token that it
    stands for, so each readout is a distribution of the next token given those before it. With
    ``evaluation.start=noise``, the readout depends on a draw of the noise. The mean of its bits over draws is
    an upper bound of the bits of the mixture over draws (Jensen).

    Raises:
        ConfigError: the split is no text.
    """
    if not isinstance(split, TokenWindows):
        raise ConfigError("bits per character are measured on text, and this data is none")
    nats: dict[str, float] = defaultdict(float)
    characters = 0
    with torch.no_grad():
        for indices in counted(model.count, "batches of text read", batches(split, section, model)):
            batch = split.batch(indices, model.device)
            characters += split.characters(indices)
            evaluations = model.evaluations(batch, model.draws(indices), section.steps_per_block)
            for name, probabilities in readouts(evaluations).items():
                nats[name] += negative_log_likelihood(probabilities, batch["tokens"])
    return {name: total / characters / math.log(2) for name, total in nats.items()}


def negative_log_likelihood(probabilities: Tensor, tokens: Tensor) -> float:
    """Negative log-likelihood of tokens (N, L) under probabilities (N, L, V), summed over all, in nats."""
    of_tokens = probabilities.gather(-1, tokens[..., None])
    # at least float32's least normal number, so that a token of probability 0 costs 126 bits, not infinity
    return float(-of_tokens.clamp_min(torch.finfo(torch.float32).tiny).double().log().sum())


def batches(split: TokenWindows, section: EvaluationConfig, model: MergedModel) -> list[Tensor]:
    """Numbers of the samples that are measured, in batches whose logits fit."""
    shape = model.run_plan.shape
    size = min(section.batch_size, max(1, MOST_LOGITS // (int(shape["length"]) * int(shape["vocabulary"]))))
    indices = evenly(len(split), section.texts)
    return [indices[start : start + size] for start in range(0, len(indices), size)]
