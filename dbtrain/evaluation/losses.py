"""Loss by noise level: which block, at which level, falls behind.
At a boundary both neighbours are measured."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from dbtrain.data.splits import Split
from dbtrain.errors import ConfigError
from dbtrain.evaluation.kept import keep
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.overrides import not_said, overridden
from dbtrain.evaluation.pipeline.places import OpenHosts
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.run.plan import RunPlan
from dbtrain.run.run import Run
from dbtrain.telemetry.counting import Count, counted, silent


@dataclass(frozen=True)
class Point:
    """One block at one level."""

    level: float
    block: int
    boundary: bool
    """Whether the level is one at which two slices meet."""
    loss: float
    """Mean over the samples, unweighted."""
    weighted: float
    """The loss times the weight of the level, as in training."""
    level_name: str = "level"
    """What such a level is called."""
    weights: str = ""
    """Hash of the model that was measured, `MergedDirectory.weights_hash`; '' in a file of before."""


def measure_losses(
    run: Run,
    count: int,
    samples: int,
    show: Callable[[list[Point]], None] = lambda points: None,
    progress: Count = silent,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
    hosts: OpenHosts | None = None,
) -> list[Point]:
    """Losses of a run's merged model on its validation split;
    also written to ``losses.json``, once they were shown.

    The noise of a sample is the same at every level and in every run, so that curves compare in pairs.

    Args:
        count: number of levels at equal shares of the training distribution; the boundaries come on top.
        samples: the most samples of the split that are measured.
        show: called with the result before it is written.
        progress: is told how far it has come.
        overrides: overrides of the section `evaluation`, or of where the data lies.
        tell: gets a line on which blocks were in memory, if not all were.
        hosts: connects to the cluster that a pipeline is in.

    Raises:
        ConfigError: the run was trained without noise, or an override is wrong.
        ShardError: the run is not merged, its files are damaged, or the losses cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open_run(run, device, changed=partial(overridden, overrides=overrides), hosts=hosts) as model:
        model.run_plan = replace(model.run_plan, paths=not_said(model.run_plan.paths, overrides))
        split, wanted = model.run_plan.data().validation, grid(model.run_plan, count)
        measured = model.blocks.walks.each(partial(_point, model, split, min(samples, len(split))), wanted)
        points = [next(measured) for _ in counted(progress, "levels measured", wanted)]
        resident = "" if model.blocks.all_here else model.blocks.told()
    show(points)
    if resident:
        tell(resident)
    keep(run, "losses.json", [asdict(point) for point in points], "the losses")
    return points


def grid(run_plan: RunPlan, count: int) -> list[tuple[float, int, bool]]:
    """(level, block, whether at a boundary), falling.

    Raises:
        ConfigError: the run was trained without noise.
    """
    if run_plan.distribution["kind"] == "none":
        raise ConfigError("this run was trained without noise (end to end): it has no loss by noise level")
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = run_plan.noise().quantile(shares)
    owned = [(float(v), int(run_plan.ranges.block_of(v)), False) for v in levels]
    edges = run_plan.ranges.edges[1:-1]
    meeting = [(edge, block, True) for i, edge in enumerate(edges) for block in (i, i + 1)]
    return sorted(owned + meeting, key=lambda row: (-row[0], row[1]))


@torch.no_grad()
def _point(model: MergedModel, split: Split, samples: int, where: tuple[float, int, bool]) -> Point:
    level, block, boundary = where
    size = model.run_plan.config.evaluation.batch_size
    sums = torch.zeros(2, dtype=torch.float64)
    for indices in torch.split(torch.arange(samples), size):
        losses, weights = _losses(model, split, indices, level, block)
        sums += torch.stack([losses.mean(dim=1).sum(), (weights * losses).mean(dim=1).sum()]).double().cpu()
    loss, weighted = (sums / samples).tolist()
    return Point(level, block, boundary, loss, weighted, model.run_plan.noise().level_name, model.weights_hash)


def _losses(model: MergedModel, split: Split, indices: Tensor, level: float, block: int) -> tuple[Tensor, Tensor]:
    """Losses and weights (n, levels of a sample)."""
    network, device = model.blocks[block], model.device
    noise = network.noise
    example = network.example(split.batch(indices, device))
    levels = torch.full((len(indices), *noise.level_shape(example)), level, device=device)
    key = torch.tensor(derive_seed("losses"), device=device)
    noisy = noise.corrupt(example.clean, levels, Draws(key, indices.to(device)))
    layers = model.run_plan.runs(block)
    output = network.predict(layers, noisy, levels, example.context)
    losses = network.loss(output.float(), example.target)
    return losses.reshape(len(indices), -1), noise.weight(levels).reshape(len(indices), -1)


def losses_table(points: list[Point]) -> Table:
    """One line for each point."""
    table = Table(points[0].level_name if points else "level", "block", "loss", "weighted", "")
    for point in points:
        note = "boundary" if point.boundary else ""
        table.add_row(f"{point.level:.4g}", str(point.block), f"{point.loss:.5f}", f"{point.weighted:.4f}", note)
    return table
