"""How good generated texts are: their perplexity under a given judge, and always also how varied they are.

Perplexity alone is best for a text that repeats one word for ever; entropy and distinct-2 reveal such texts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from dbtrain.config import EvaluationConfig
from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import Split, evenly
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.text.generate import GENERATORS, Generate
from dbtrain.evaluation.text.judge import Judge, hash_of
from dbtrain.evaluation.text.mauve import mauve, ngram_features
from dbtrain.models.registry import architecture

GENERATED = 256
"""Texts drawn, unless ``evaluation.texts`` says otherwise."""
SEED = 0


def generated(model: MergedModel, split: Split, section: EvaluationConfig) -> dict[str, float]:
    """``entropy`` (bits a token), ``distinct_2`` and, with a judge, ``perplexity`` of texts of full length
    drawn at temperature 1. The same figures of as many texts of the split, to compare with, are under
    ``text_...``. With ``evaluation.mauve`` also how near the two are, see
    :mod:`dbtrain.evaluation.text.mauve`.

    Raises:
        ConfigError: the model draws no texts, the judge cannot be read or reads no texts so long,
            or MAUVE's package is missing.
    """
    generates = architecture(model.run_plan.config.model.arch).continues
    if not isinstance(split, TokenWindows) or generates is None:
        raise ConfigError("evaluation.metric=generated needs a model that writes text: choose another metric")
    judge = Judge(section.judge, model.device) if section.judge else None
    indices = evenly(len(split), section.texts or GENERATED)
    own = _drawn(model, GENERATORS[generates], section.batch_size, len(indices))
    given = [split.tokens[index].tolist() for index in indices.tolist()]
    texts = {prefix: [split.tokenizer.decode(row) for row in rows] for prefix, rows in (("", own), ("text_", given))}
    scores: dict[str, float] = {}
    for prefix, rows in (("", own), ("text_", given)):
        if judge:
            scores[f"{prefix}perplexity"] = judge.perplexity(texts[prefix])
        scores[f"{prefix}entropy"] = entropy(rows)
        scores[f"{prefix}distinct_2"] = distinct(rows, 2)
    if section.mauve:
        name, features = ("mauve", judge.features) if judge else ("ngram_mauve", ngram_features)
        scores[name] = mauve(features(texts["text_"]), features(texts[""]))
    return scores


def _drawn(model: MergedModel, generate: Generate, size: int, count: int) -> list[list[int]]:
    """Tokens of so many texts, at most `size` of them at a time."""

    def draw(first: int) -> list[list[int]]:
        nothing = torch.zeros(min(size, count - first), 0, dtype=torch.int64, device=model.device)
        rows: list[list[int]] = generate(model, nothing, int(model.run_plan.shape["length"]), 1.0, SEED, first).tolist()
        return rows

    texts: list[list[int]] = []
    model.count("texts written", 0, count)
    for rows in model.blocks.walks.each(draw, range(0, count, size)):
        texts += rows
        model.count("texts written", len(texts), count)
    return texts


def entropy(rows: Sequence[Sequence[int]]) -> float:
    """Mean entropy, in bits, of the frequencies of the tokens within a text."""
    return sum(_entropy(Counter(row)) for row in rows) / len(rows)


def _entropy(counts: Counter[int]) -> float:
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams within a text as a share of all its n-grams, mean over texts  # Li et al. 2016."""
    shares = []
    for row in rows:
        grams = list(zip(*(row[i:] for i in range(n)), strict=False))
        shares.append(len(set(grams)) / max(1, len(grams)))
    return sum(shares) / len(shares)


def describe_judge(section: EvaluationConfig) -> dict[str, Any]:
    """Path of the judge and the hash of its weights."""
    if section.judge is None:
        return {"judge": None}
    return {"judge": section.judge, "judge_sha256": hash_of(section.judge)}
