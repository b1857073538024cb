"""Whether two networks hold the same geometry, layer by layer: CKA of their states on the same prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dbtrain.errors import ConfigError
from dbtrain.evaluation.sweep.concepts import ConceptSet
from dbtrain.evaluation.sweep.geometry import Floats
from dbtrain.evaluation.sweep.hidden import Swept

PERMUTATIONS = 19
"""Number of permutations: a value greater than all of them has p = 0.05."""
FEWEST = 4
"""Least number of prompts for which the estimate has a value."""


@dataclass(frozen=True)
class Beside:
    """Two networks with the same number of layers."""

    one: str
    two: str
    layers: list[int]
    cka: list[float]
    """CKA of the same layer of both models; 1 for the same geometry, 0 on average if they have nothing in
    common."""
    permuted: list[float]
    """Greatest CKA among `PERMUTATIONS` permutations of one network's labels: how alike networks are only
    because both keep the prompts of a label together."""


def compare(models: Sequence[Swept], sets: Sequence[ConceptSet]) -> list[Beside]:
    """CKA of every pair of networks, on the prompts of all sets together.

    Raises:
        ConfigError: they have not the same layers, or a set does not fit one of them.
    """
    for model in models[1:]:
        if model.layers != models[0].layers:
            raise ConfigError(
                f"--beside: {model.name} has layers {model.layers[0]} to {model.layers[-1]} and {models[0].name} "
                f"{models[0].layers[0]} to {models[0].layers[-1]}: compare networks of the same depth"
            )
    read = [[model.states(one) for one in sets] for model in models]
    states = [np.concatenate([of_set.hidden for of_set in of_model]) for of_model in read]
    orders = _permuted([of_set.labels for of_set in read[0]])
    return [
        _pair(models[i].name, models[j].name, models[0].layers, states[i], states[j], orders)
        for i, j in combinations(range(len(models)), 2)
    ]


def _pair(
    one: str, two: str, layers: list[int], first: Floats, second: Floats, orders: Sequence[NDArray[np.int64]]
) -> Beside:
    places = range(len(layers))
    found = [cka(first[:, place], second[:, place]) for place in places]
    nulls = [max(cka(first[:, place], second[order, place]) for order in orders) for place in places]
    return Beside(one, two, layers, found, nulls)


def _permuted(labels: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Numbers of all prompts in which those of a label take the places of another label's."""
    generator = np.random.default_rng(0)
    return [np.concatenate(list(_moved(labels, generator))) for _ in range(PERMUTATIONS)]


def _moved(labels: Sequence[NDArray[np.int64]], generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    before = 0
    for of_set in labels:
        places = [np.flatnonzero(of_set == label) for label in range(of_set.max() + 1)]
        order = np.empty(len(of_set), dtype=np.int64)
        for own, other in zip(places, generator.permutation(len(places)), strict=True):
            order[own] = np.resize(places[other], len(own))
        yield before + order
        before += len(of_set)


def cka(one: Floats, two: Floats) -> float:
    """Linear CKA of two sets of states (prompts, width), by the unbiased estimate of HSIC.

    The plain estimate is near 1 for any two sets with fewer prompts than axes  # Song et al. (2012), eq. (5)
    """
    if len(one) < FEWEST:
        raise ConfigError(f"CKA needs at least {FEWEST} prompts, and there are {len(one)}")
    first, second = (_kernel(states) for states in (one, two))
    own = _hsic(first, first) * _hsic(second, second)
    return _hsic(first, second) / float(np.sqrt(own)) if own > 0 else 0.0


def _kernel(states: Floats) -> Floats:
    centred = states - states.mean(axis=0)
    kernel = centred @ centred.T
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _hsic(one: Floats, two: Floats) -> float:
    count = len(one)
    middle = one.sum() * two.sum() / ((count - 1) * (count - 2))
    across = 2 * float(one.sum(axis=0) @ two.sum(axis=0)) / (count - 2)
    return float(((one * two).sum() + middle - across) / (count * (count - 3)))
