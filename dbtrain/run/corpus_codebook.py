"""Target codes from a text: tokens that stand in like places get codes that lie near each other."""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import Split
from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook

WINDOW = 5
"""Tokens to each side that count as neighbours."""
MOST_TOKENS = 1 << 25
"""Tokens read of the training split, its first; more change the counts little."""


def corpus_codebook(split: Split, vocabulary: int, dim: int, seed: int) -> Tensor:
    """(vocabulary, dim) float32 rows of norm 1: singular vectors of positive pointwise mutual information.

    # Levy & Goldberg 2014, section 3: PPMI of neighbours, truncated SVD, columns weighted by root values
    The row of a token that never occurs in the text is a random direction. If the text gives fewer than `dim`
    directions, the other columns are zero.

    Raises:
        ConfigError: the split is no text.
    """
    from sklearn.utils.extmath import randomized_svd

    if not isinstance(split, TokenWindows):
        raise ConfigError("codebook.source=corpus counts tokens, and this data is no text: choose orthogonal or random")
    ppmi = _ppmi(split, vocabulary)
    rank = min(dim, vocabulary)
    left, values, _ = randomized_svd(ppmi, n_components=rank, random_state=seed % 2**32)
    codes = torch.zeros(vocabulary, dim, dtype=torch.float64)
    codes[:, :rank] = torch.from_numpy(left * np.sqrt(values))
    norms = codes.norm(dim=1, keepdim=True)
    spare = make_codebook("random", vocabulary, dim, seed).double()
    return torch.where(norms > 1e-6 * norms.max(), codes / norms.clamp_min(1e-300), spare).float()


def _ppmi(split: TokenWindows, vocabulary: int):  # type: ignore[no-untyped-def]
    """max(0, log p(a, b) / (p(a) p(b))) as a sparse matrix (V, V) over the pairs that occur."""
    from scipy.sparse import coo_array

    counts = coo_array((vocabulary, vocabulary), dtype=np.float64).tocsr()
    rows = max(1, MOST_TOKENS // split.tokens.shape[1])
    for start in range(0, min(rows, len(split)), 1024):
        tokens = split.tokens[start : start + 1024].astype(np.int64)
        for offset in range(1, min(WINDOW + 1, tokens.shape[1])):
            first, second = tokens[:, :-offset].ravel(), tokens[:, offset:].ravel()
            pairs = coo_array((np.ones(len(first)), (first, second)), (vocabulary, vocabulary))
            counts += pairs.tocsr()
    both = (counts + counts.T).tocoo()
    share = np.asarray(both.sum(axis=1)).ravel() / both.sum()
    row, column = cast(tuple[np.ndarray, np.ndarray], both.coords)
    positive = np.maximum(np.log(both.data / both.sum() / (share[row] * share[column])), 0)
    return coo_array((positive, (row, column)), both.shape).tocsr()
