"""MAUVE: how near the distribution of drawn texts is to that of real ones,
between 0 and 1  # Pillutla et al. 2021.

It compares features. With those of a judge it is called ``mauve``; without a judge, with counts of character
n-grams in their place, ``ngram_mauve``. Neither compares with the other, nor with published figures of
another judge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dbtrain.errors import ConfigError

GRAMS = (1, 4)
"""Shortest and longest n-gram."""
HASHES = 2**12
SEED = 0
"""Seed of MAUVE's clusters."""


def ngram_features(texts: Sequence[str]) -> Tensor:
    """Counts of hashed character n-grams, each text's of unit length, (texts, HASHES)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(analyzer="char", ngram_range=GRAMS, n_features=HASHES, lowercase=False)
    return torch.from_numpy(vectorizer.transform(texts).toarray()).float()


def mauve(given: Tensor, own: Tensor) -> float:
    """MAUVE of features of real and of drawn texts, each (texts, width).

    Raises:
        ConfigError: the package mauve-text is not installed.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ConfigError(
            "evaluation.mauve=true needs the package mauve-text: install dbtrain[mauve], or set evaluation.mauve=false"
        ) from error
    return float(compute_mauve(p_features=given.numpy(), q_features=own.numpy(), seed=SEED).mauve)
