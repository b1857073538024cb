"""Which process holds which blocks, and how fast that can be at most."""

from collections.abc import Mapping, Sequence

import torch

from dbtrain.config.evaluation import EvaluationConfig
from dbtrain.method.sampler import spaced_levels
from dbtrain.models.registry import architecture
from dbtrain.run.plan import RunPlan


def loads(run_plan: RunPlan, section: EvaluationConfig) -> dict[int, int]:
    """What each model has to compute for one batch, in layers, by the number of its last shard.

    Layers of all blocks are alike, so that their number stands for their FLOPs. A sample is drawn at the
    levels of the section, and Heun evaluates the block of the level that a step leads to once more; for
    everything else each block is evaluated equally often.
    """
    blocks = range(run_plan.split.blocks)
    evaluations = dict.fromkeys(blocks, 1)
    if architecture(run_plan.config.model.arch).samples:
        levels = spaced_levels(run_plan.noise(), run_plan.ranges, section.steps, section.spacing)
        owners = run_plan.ranges.block_of(torch.tensor(levels, dtype=torch.float64)).tolist()
        evaluated = [*owners, *(owners[1:] if section.solver == "heun" else ())]
        evaluations = {block: evaluated.count(block) for block in blocks}
    found: dict[int, int] = {}
    for block in blocks:
        unit = run_plan.scheme.sources(block)[-1]
        found[unit] = found.get(unit, 0) + evaluations[block] * len(run_plan.runs(block))
    return found


def fastest(loads: Mapping[int, int], room: int) -> list[tuple[int, ...]]:
    """The models that each process holds, of at most so many: no process more than makes it faster."""
    ways = [share_out(loads, stages) for stages in range(1, room + 1)]
    return max(ways, key=lambda placed: (round(most_speedup(loads, placed), 6), -len(placed)))


def share_out(loads: Mapping[int, int], stages: int) -> list[tuple[int, ...]]:
    """The models that each of so many processes holds.

    With fewer processes than models, the largest load goes first, each to the process that has least. With
    more, one more process at a time goes to the model whose processes have most to do each, so that they are
    shared out in proportion to the loads.
    """
    by_load = sorted(loads, key=lambda unit: (-loads[unit], unit))
    if stages < len(loads):
        held: list[list[int]] = [[] for _ in range(stages)]
        for unit in by_load:
            min(held, key=lambda units: sum(loads[u] for u in units)).append(unit)
        return sorted(tuple(sorted(units)) for units in held)
    copies = dict.fromkeys(loads, 1)
    for _ in range(stages - len(loads)):
        copies[max(by_load, key=lambda unit: loads[unit] / copies[unit])] += 1
    return [(unit,) for unit in sorted(loads) for _ in range(copies[unit])]


def most_speedup(loads: Mapping[int, int], placed: Sequence[tuple[int, ...]]) -> float:
    """How much faster than one process these can be at most: when the one with most to do never waits."""
    copies = {unit: sum(unit in units for units in placed) for unit in loads}
    slowest = max(sum(loads[unit] / copies[unit] for unit in units) for units in placed)
    return sum(loads.values()) / slowest if slowest else 1.0
