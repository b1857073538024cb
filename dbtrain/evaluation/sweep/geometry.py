"""The measures of one layer: how its distances between concepts agree with behaviour, and with an order.

Everything has a null: a permutation test of the labels for correlations, resampled prompts for their spread,
and random centroids for the arc.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dbtrain.evaluation.sweep.concepts import Order, order_distances

Floats = NDArray[np.float64]
MOST_EXACT = 5040
"""The most permutations for which all are tried: those of 7 labels."""
DRAWS = 4999
"""Number of permutations that are drawn if there are more than that."""
RESAMPLES = 200
"""Resamples of the prompts, from which the interval is taken."""
INTERVAL = (2.5, 97.5)
"""Percentiles that bound an interval."""
NULLS = 400
"""Number of random sets of centroids that give the band of the arc."""
KNOTS = 64
"""Points between two labels at which a spline's length is summed."""
FOLDS = 5


@dataclass(frozen=True)
class Correlation:
    """Correlation of two tables of distances between the same labels."""

    r: float
    p: float
    """Share of the permutations of the labels with as great an r, one-sided; never 0."""
    exact: bool
    """Whether all permutations were tried."""


def centroids(states: Floats, labels: NDArray[np.int64], count: int) -> Floats:
    """Mean state of each label: (prompts, width) -> (count, width)."""
    return np.stack([states[labels == label].mean(axis=0) for label in range(count)])


def reduced(states: Floats, most: int) -> Floats:
    """The states on their principal axes, at most so many: (prompts, width) -> (prompts, <= most)."""
    centred = states - states.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :most] * values[:most]


def distances(points: Floats) -> Floats:
    """Euclidean distances, (n, width) -> (n, n)."""
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def hellinger(chances: Floats) -> Floats:
    """Hellinger distances between distributions, (n, outcomes) -> (n, n): sqrt(1 - sum sqrt(p q)), from 0 to
    1."""
    roots = np.sqrt(chances)
    return np.sqrt(np.clip(1 - roots @ roots.T, 0, None))


def pearson(one: Floats, two: Floats) -> float:
    """Correlation of the pairs above the diagonals; 0 where one of them does not vary."""
    upper = np.triu_indices(len(one), 1)
    first, second = one[upper] - one[upper].mean(), two[upper] - two[upper].mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm > 0 else 0.0


def spearman(one: Floats, two: Floats) -> float:
    """The same as `pearson`, for the ranks; ties share their mean rank."""
    return pearson(_ranked(one), _ranked(two))


def _ranked(table: Floats) -> Floats:
    from scipy.stats import rankdata

    upper = np.triu_indices(len(table), 1)
    ranks = np.zeros_like(table)
    ranks[upper] = rankdata(table[upper])
    return ranks


def mantel(one: Floats, two: Floats, seed: int) -> Correlation:
    """Correlation of two tables of distances, tested by permuting the labels of one  # Mantel (1967)

    If there are few permutations, all are tried, the identity among them; otherwise some are drawn, and the
    identity is added to them  # Phipson & Smyth (2010).
    """
    count, observed = len(one), pearson(one, two)
    exact = math.factorial(count) <= MOST_EXACT
    if exact:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        generator = np.random.default_rng(seed)
        orders = np.array([generator.permutation(count) for _ in range(DRAWS)])
    upper = np.triu_indices(count, 1)
    first = one[upper] - one[upper].mean()
    second = two[orders[:, upper[0]], orders[:, upper[1]]]
    second = second - second.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(first) * np.linalg.norm(second, axis=1)
    found = np.divide(second @ first, norm, out=np.zeros(len(orders)), where=norm > 0)
    as_great = int(np.sum(found >= observed - 1e-12))
    return Correlation(observed, as_great / len(orders) if exact else (as_great + 1) / (len(orders) + 1), exact)


def resamples(labels: NDArray[np.int64], templates: NDArray[np.int64] | None, seed: int) -> list[NDArray[np.int64]]:
    """Numbers of prompts, drawn with replacement, the same for every layer.

    Args:
        labels: (prompts,).
        templates: (prompts,) if all labels stand in the same templates, which are then drawn for all labels
            together. Drawn for each label alone, the templates would make labels differ in both tables, and r
            would rise. None if every label has prompts of its own, such as images.
        seed: seed of the draws.
    """
    generator = np.random.default_rng(seed)
    if templates is not None:
        in_template = [np.flatnonzero(templates == template) for template in np.unique(templates)]
        drawn = generator.integers(len(in_template), size=(RESAMPLES, len(in_template)))
        return [np.concatenate([in_template[number] for number in one]) for one in drawn]
    own = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [np.concatenate([generator.choice(one, len(one)) for one in own]) for _ in range(RESAMPLES)]


def probe(states: Floats, labels: NDArray[np.int64], groups: NDArray[np.int64]) -> float | None:
    """Accuracy of a linear probe on templates that it was not fitted to; None if there are fewer than two."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    folds = min(FOLDS, len(np.unique(groups)))
    if folds < 2:
        return None
    right = 0
    # one scale for all axes: if whitened, with as many axes as prompts, all prompts would be orthogonal
    states = states / (states.std() or 1.0)
    for fit, held in GroupKFold(folds).split(states, labels, groups):
        right += int(
            np.sum(LogisticRegression(max_iter=500).fit(states[fit], labels[fit]).predict(states[held]) == labels[held])
        )
    return right / len(labels)


def arc(points: Floats, order: Order) -> float | None:
    """How well distances along a spline through the centroids agree with distances in the labels' order.

    The spline goes through the centroids by the angle atan2(PC2, PC1), never by their labels: ordered by
    labels, even random centroids have r = 0.99. None for anything but a cyclic order: a line has no angle.
    """
    wanted = order_distances(len(points), order)
    if wanted is None or order != "cyclic":
        return None
    flat = reduced(points, min(8, len(points) - 1))
    ring = np.argsort(np.arctan2(flat[:, 1], flat[:, 0]))
    way = _way(flat[ring])
    between = np.abs(np.subtract.outer(way[:-1], way[:-1]))
    between = np.minimum(between, way[-1] - between)
    back = np.argsort(ring)
    return pearson(between[np.ix_(back, back)], wanted)


def _way(ring: Floats) -> Floats:
    """Lengths along a closed cubic spline from the first of n points to each, and all around: (n + 1,)."""
    from scipy.interpolate import CubicSpline

    closed = np.concatenate([ring, ring[:1]])
    spline = CubicSpline(np.arange(len(closed)), closed, bc_type="periodic")
    fine = spline(np.linspace(0, len(ring), KNOTS * len(ring) + 1))
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(fine, axis=0), axis=1))])
    return lengths[::KNOTS]


def arc_band(count: int, width: int, order: Order, seed: int) -> tuple[float, float] | None:
    """Percentiles of `arc` for random centroids, in which there is nothing to find."""
    if order != "cyclic":
        return None
    generator = np.random.default_rng(seed)
    found = [arc(generator.standard_normal((count, width)), order) or 0.0 for _ in range(NULLS)]
    low, high = np.percentile(found, INTERVAL)
    return float(low), float(high)
