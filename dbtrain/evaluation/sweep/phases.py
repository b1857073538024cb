"""Where the curves over the layers have steps: suggested phases, and how stable they are. A heuristic.

A curve that rises without a step has change points too, so trust a suggestion only as far as it is stable.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbtrain.errors import ConfigError
from dbtrain.evaluation.sweep.geometry import Floats

NEAR = 1
"""Distance, in layers, within which two change points count as the same."""
LEAST = 2
"""Least number of layers in a phase."""
FEWEST = 4
"""Least number of layers for each phase; with fewer nothing is suggested, as all cuts are near each other."""


@dataclass(frozen=True)
class Boundaries:
    """Change points for one number of phases."""

    phases: int
    after: tuple[int, ...]
    """Layers after which a new phase begins, as the curves number them."""
    stability: tuple[float, ...]
    """Share of the resamples that have a change point within `NEAR` curve points of each."""
    chance: tuple[float, ...]
    """Share of all possible cuts that are as near to each: the stability that chance alone gives."""
    explained: float
    """Share of the curves' variance that the means of the phases explain."""


def change_points(curves: Floats, count: int) -> list[int]:
    """Places (points of the curves) before which the means of the curves change most.

    Args:
        curves: (points, curves), each is standardised.
        count: change points to find: the best partition, by dynamic programming (ruptures).

    Raises:
        ConfigError: the package ruptures is not installed.
    """
    try:
        import ruptures
    except ModuleNotFoundError:
        raise ConfigError("dbtrain sweep needs the package ruptures: pip install ruptures") from None
    found = ruptures.Dynp(model="l2", min_size=LEAST, jump=1).fit(_standardised(curves)).predict(n_bkps=count)
    return [int(place) for place in found[:-1]]


def _standardised(curves: Floats) -> Floats:
    spread = curves.std(axis=0)
    return (curves - curves.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def boundaries(curves: Floats, again: Sequence[Floats], layers: Sequence[int], phases: int) -> Boundaries | None:
    """Suggested boundaries for so many phases; None where there are too few layers.

    Args:
        curves: (layers, concept sets).
        again: the same curves from resampled prompts.
        layers: numbers of the layers.
        phases: number of phases that they are cut into.
    """
    if len(layers) < FEWEST * phases:
        return None
    places = change_points(curves, phases - 1)
    drawn = [change_points(one, phases - 1) for one in again]
    possible = _cuts(len(layers), phases - 1)
    stability, chance = (tuple(_near(place, among) for place in places) for among in (drawn, possible))
    return Boundaries(phases, tuple(layers[p - 1] for p in places), stability, chance, _explained(curves, places))


def _near(place: int, among: Sequence[Sequence[int]]) -> float:
    """Share of the partitions with a change point near a place."""
    return sum(any(abs(other - place) <= NEAR for other in found) for found in among) / len(among) if among else 0.0


def _cuts(points: int, count: int) -> list[tuple[int, ...]]:
    """All partitions whose phases are long enough."""
    every = itertools.combinations(range(1, points), count)
    return [cut for cut in every if all(b - a >= LEAST for a, b in itertools.pairwise((0, *cut, points)))]


def _explained(curves: Floats, places: Sequence[int]) -> float:
    values = _standardised(curves)
    parts = np.split(values, list(places))
    within = sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in parts)
    whole = float((values**2).sum())
    return 1 - within / whole if whole > 0 else 0.0
