"""Bits per character of an autoregressive language model: a likelihood,
whose noisy codes know nothing of the text."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import Split, evenly
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import MergedModel, probabilities, read_out
from dbtrain.method.draws import Draws
from dbtrain.method.sampler import Evaluation
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
        for group in counted(model.count, "batches of text read", text_groups(model, batches(split, section, model))):
            texts = [(split.batch(indices, model.device)["tokens"], model.draws(indices)) for indices in group]
            characters += sum(split.characters(indices) for indices in group)
            for by_readout in chances(model, texts):
                for name, found in by_readout.items():
                    nats[name] += negative_log(found)
    return {name: total / characters / math.log(2) for name, total in nats.items()}


def text_groups(model: MergedModel, batches: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Batches (n, ...) of n texts each, in the groups that :func:`chances` takes."""
    shape, codebook = model.run_plan.shape, model.run_plan.codebook
    width = 1 if codebook is None else codebook.shape[1]
    # a code, its estimate and the next code, 4 bytes a number, of each token of the first batch
    return model.groups(batches, each=12 * len(batches[0]) * int(shape["length"]) * width)


def chances(model: MergedModel, texts: Sequence[tuple[Tensor, Draws]]) -> list[dict[str, Tensor]]:
    """Probability (N, L) of each token that stands there, by readout, of batches of texts.

    Args:
        model: the merged model.
        texts: tokens (N, L) of each batch, and its randomness.
    """

    def walk(tokens: Tensor, draws: Draws) -> Iterator[tuple[int, Tensor]]:
        def there(evaluation: Evaluation) -> tuple[int, Tensor]:
            block, outcomes = probabilities(evaluation)
            return block, outcomes.gather(-1, tokens[..., None])[..., 0]

        steps = model.run_plan.config.evaluation.steps_per_block
        return map(there, model.walk({"tokens": tokens}, draws, steps))

    return [read_out(along) for along in model.side_by_side([walk(*text) for text in texts])]


def negative_log(found: Tensor) -> float:
    """Negative log-likelihood of tokens of these probabilities, summed over all, in nats."""
    # at least float32's least normal number, so that a token of probability 0 costs 126 bits, not infinity
    return float(-found.clamp_min(torch.finfo(torch.float32).tiny).double().log().sum())


def batches(split: TokenWindows, section: EvaluationConfig, model: MergedModel) -> list[Tensor]:
    """Numbers of the samples that are measured, in batches whose logits fit."""
    shape = model.run_plan.shape
    size = min(section.batch_size, max(1, MOST_LOGITS // (int(shape["length"]) * int(shape["vocabulary"]))))
    indices = evenly(len(split), section.texts)
    return [indices[start : start + size] for start in range(0, len(indices), size)]
