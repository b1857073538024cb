"""Sweep the layers of a model: measure every layer on every concept set, and look for phases."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from rich.table import Table

from dbtrain.errors import ConfigError
from dbtrain.evaluation.sweep import geometry
from dbtrain.evaluation.sweep.concepts import ConceptSet, Order, order_distances
from dbtrain.evaluation.sweep.geometry import Floats
from dbtrain.evaluation.sweep.hidden import States, Swept
from dbtrain.evaluation.sweep.phases import Boundaries, boundaries
from dbtrain.evaluation.sweep.similarity import Beside, compare
from dbtrain.telemetry.counting import Count, counted, silent

SWEEP = "sweep.json"
SIGNIFICANT = 0.05
PHASES = (2, 3)
Behaviour = Literal["vocabulary", "concepts"]


@dataclass(frozen=True)
class Layer:
    """One layer on one concept set."""

    layer: int
    r: float
    """Pearson correlation of the centroids' distances in this layer with distances in behaviour."""
    p: float
    """p-value of `r`, by permuting the labels; not corrected for the number of layers."""
    low: float
    high: float
    """Upper end of the interval of `r` over resampled prompts; `low` is the lower end."""
    spearman: float
    order_r: float | None
    """Pearson correlation with the labels' distances in their order; None without an order."""
    order_p: float | None
    probe: float | None
    """Accuracy of a linear probe for the label, on templates that it has not seen."""
    arc: float | None


@dataclass(frozen=True)
class SetResult:
    """A concept set over all layers."""

    name: str
    order: Order
    labels: list[str]
    prompts: int
    exact: bool
    """Whether all permutations were tried."""
    behaviour_r: float | None
    """Correlation of the behaviour's own distances with those of the order; None without an order."""
    behaviour_p: float | None
    significant: bool
    """Whether the behaviour knows the order, and a layer has it too, corrected for the number of layers."""

    arc_band: tuple[float, float] | None
    """Interval with 95 % of the values of `arc` for random centroids."""
    layers: list[Layer]

    def marked(self, row: "Layer") -> bool:
        """Whether a layer has the order that the behaviour has, corrected for the number of layers."""
        return self.significant and row.order_p is not None and row.order_p * len(self.layers) <= SIGNIFICANT


@dataclass(frozen=True)
class Sweep:
    """What sweep.json holds."""

    model: str
    behaviour: Behaviour
    pca: int
    seed: int
    sets: list[SetResult]
    phases: list[Boundaries]
    beside: list[Beside] = field(default_factory=list)
    """Pairs of networks, where others were named."""
    weights: str = ""
    """Hash of the run's model, `MergedDirectory.weights_hash`; '' of a folder, and in a file of before."""


def sweep(
    model: Swept,
    sets: Sequence[ConceptSet],
    behaviour: Behaviour = "vocabulary",
    pca: int = 64,
    seed: int = 0,
    count: Count = silent,
    others: Sequence[Swept] = (),
) -> Sweep:
    """Measure all layers of a model.

    Args:
        model: read once for each set.
        sets: concept sets.
        behaviour: the distribution over the whole vocabulary,
            or over the first tokens of the labels and the rest.
        pca: the most axes on which states are compared.
        seed: seed of permutations and resamples.
        count: is told how far it has come.
        others: networks with which its states are compared, layer by layer, and with one another.

    Raises:
        ConfigError: a set does not fit a model, or others have not the same layers.
    """
    results, curves, again = [], [], []
    for concepts in sets:
        result, drawn = measure(concepts, _outcomes(model, concepts, behaviour), model.layers, pca, seed, count)
        results.append(result)
        curves.append([layer.r for layer in result.layers])
        again.append(drawn)
    table = np.array(curves).T
    resampled = [np.stack([one[i] for one in again], axis=1) for i in range(geometry.RESAMPLES)]
    found = [boundaries(table, resampled, model.layers, phases) for phases in PHASES]
    beside = compare([model, *others], sets) if others else []
    suggested = [one for one in found if one is not None]
    return Sweep(model.name, behaviour, pca, seed, results, suggested, beside, model.weights)


def _outcomes(model: Swept, concepts: ConceptSet, behaviour: Behaviour) -> States:
    states = model.states(concepts)
    if behaviour == "vocabulary":
        return states
    tokens = model.first_tokens(concepts)
    if len(set(tokens)) < len(tokens):
        one, two = next((i, j) for j in range(len(tokens)) for i in range(j) if tokens[i] == tokens[j])
        raise ConfigError(
            f"{concepts.labels[one]!r} and {concepts.labels[two]!r} of {concepts.name} begin with the same token for "
            f"{model.name}: use --behaviour vocabulary"
        )
    named = states.chances[:, tokens]
    rest = np.clip(1 - named.sum(axis=1, keepdims=True), 0, None)
    return replace(states, chances=np.concatenate([named, rest], axis=1))


def measure(
    concepts: ConceptSet, states: States, layers: Sequence[int], pca: int, seed: int, count: Count = silent
) -> tuple[SetResult, Floats]:
    """One concept set over all layers, and r of the resampled prompts (resamples, layers)."""
    size, labels = len(concepts.labels), states.labels
    wanted = order_distances(size, concepts.order)
    said = geometry.hellinger(geometry.centroids(states.chances, labels, size))
    draws = geometry.resamples(labels, states.templates if states.paired else None, seed)
    said_again = [geometry.hellinger(geometry.centroids(states.chances[d], labels[d], size)) for d in draws]
    rows, drawn, exact = [], [], False
    for place, layer in enumerate(counted(count, f"layers measured on {concepts.name}", layers)):
        points = geometry.reduced(states.hidden[:, place], pca)
        tables = [geometry.distances(geometry.centroids(points[d], labels[d], size)) for d in draws]
        again = np.array([geometry.pearson(a, b) for a, b in zip(tables, said_again, strict=True)])
        row, exact = _layer(layer, points, states, said, wanted, again, concepts.order, seed)
        rows.append(row)
        drawn.append(again)
    known = None if wanted is None else geometry.mantel(said, wanted, seed)
    width = min(pca, states.hidden.shape[-1])
    result = SetResult(
        name=concepts.name,
        order=concepts.order,
        labels=concepts.labels,
        prompts=len(labels),
        exact=exact,
        behaviour_r=known.r if known else None,
        behaviour_p=known.p if known else None,
        significant=_significant(rows, known.p if known else None),
        arc_band=geometry.arc_band(size, width, concepts.order, seed),
        layers=rows,
    )
    return result, np.array(drawn).T


def _layer(
    layer: int, points: Floats, states: States, said: Floats, wanted: Floats | None, again: Floats, order: Order,
    seed: int,
) -> tuple[Layer, bool]:  # fmt: skip
    middle = geometry.centroids(points, states.labels, len(said))
    here = geometry.distances(middle)
    found = geometry.mantel(here, said, seed)
    ordered = None if wanted is None else geometry.mantel(here, wanted, seed)
    low, high = np.percentile(again, geometry.INTERVAL)
    row = Layer(
        layer=layer,
        r=found.r,
        p=found.p,
        low=float(low),
        high=float(high),
        spearman=geometry.spearman(here, said),
        order_r=ordered.r if ordered else None,
        order_p=ordered.p if ordered else None,
        probe=geometry.probe(points, states.labels, states.templates),
        arc=geometry.arc(middle, order),
    )
    return row, found.exact


def _significant(rows: Sequence[Layer], behaviour_p: float | None) -> bool:
    """Whether the order is found, with a Bonferroni correction over the layers. r alone shows nothing: the
    answer is a function of the last layer, so that their distances agree even in a random network."""
    least = min((row.order_p for row in rows if row.order_p is not None), default=1.0)
    return behaviour_p is not None and behaviour_p <= SIGNIFICANT and least * len(rows) <= SIGNIFICANT


def record(found: Sweep) -> dict[str, Any]:
    """The JSON object of a sweep."""
    return asdict(found)


def sweep_table(result: SetResult) -> Table:
    """One line for each layer."""
    how = "exact" if result.exact else "drawn"
    title = f"{result.name} ({result.order}): {len(result.labels)} labels, {result.prompts} prompts; p is {how}"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "r", "95 %", "p", "spearman", "r order", "p order", "probe", "arc"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.layers:
        optional = [_written(value) for value in (row.order_r, row.order_p, row.probe, row.arc)]
        interval = f"{row.low:.2f} to {row.high:.2f}"
        table.add_row(str(row.layer), f"{row.r:.3f}", interval, f"{row.p:.4f}", f"{row.spearman:.3f}", *optional)
    return table


def beside_table(found: Sweep) -> Table:
    """CKA of each pair of networks by layer."""
    pairs = [f"{pair.one} and {pair.two}" for pair in found.beside]
    table = Table(
        "layer", *pairs, title="CKA of the same layer (the greatest of 19 with permuted labels)", title_justify="left"
    )
    for place, layer in enumerate(found.beside[0].layers):
        table.add_row(str(layer), *(f"{pair.cka[place]:.3f} ({pair.permuted[place]:.3f})" for pair in found.beside))
    return table


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def lines(found: Sweep, tell: Callable[[str], None]) -> None:
    """What the tables mean, in words."""
    for result in found.sets:
        tell(f"{result.name}: {verdict(result)}")
    for phases in found.phases:
        cuts = ", ".join(
            f"{at} (stable in {100 * stable:.0f} %, by chance {100 * chance:.0f} %)"
            for at, stable, chance in zip(phases.after, phases.stability, phases.chance, strict=True)
        )
        tell(f"{phases.phases} phases: cut after layer {cuts}; the means explain {100 * phases.explained:.0f} %")
    if not found.phases:
        tell("no boundaries are suggested: there are too few layers")
    else:
        tell("boundaries are a heuristic: a curve without any step has them too, and no training has proved them")


def verdict(result: SetResult) -> str:
    """One line on whether there is anything to see."""
    if result.order == "none":
        return "no order to test; r is not evidence alone, since the answer is a function of the last layer"
    said = f"behaviour r {result.behaviour_r:.2f} with the order, p {result.behaviour_p:.4f}"
    if not result.significant:
        return f"not significant: {said}"
    best = min(result.layers, key=lambda row: row.order_p if row.order_p is not None else 1.0)
    return f"significant: {said}; layer {best.layer} has it most, r {best.order_r:.2f}, p {best.order_p:.4f}"
