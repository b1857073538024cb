"""Draw samples from a merged model, class by class: each step runs the block that owns its level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dbtrain.data.splits import partners
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import LoadBlock, Where, load_model
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import BlockModel
from dbtrain.method.sampler import Denoise, Solver, chain, guide, karras_schedule
from dbtrain.run.plan import RunPlan

Spacing = Literal["karras", "slices"]
"""`karras`: EDM's schedule over the whole range; `slices`: as many steps in every slice, equal shares of its mass."""

BlockAt = Callable[[int], BlockModel]
"""Model of a block, on the device."""


@dataclass(frozen=True)
class Plan:
    """How samples are drawn."""

    levels: tuple[float, ...]
    """Falling noise levels, one evaluation each (two with Heun, but for the last)."""
    solver: Solver = "euler"
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 for none, which spares the unconditional evaluations."""
    seed: int = 0
    order: tuple[int, ...] | None = None
    """Block that is asked for each slice, the owner by default; another order is a control."""
    blend: bool = False
    """Average the estimates of all blocks that were trained at a level: near a boundary, of both neighbours."""
    scrambled: bool = False
    """Tell the classes of other samples, others at every level: a control."""


class OneBlock:
    """Blocks of a merged model, read when a step needs them; at most one is held in memory.

    Args:
        run_plan: of the run.
        load: tensors of a block by their names in the whole model.
        device: where the block is put.
        where: files of the blocks, for messages.
    """

    def __init__(
        self,
        run_plan: RunPlan,
        load: LoadBlock,
        device: torch.device,
        where: Where = lambda block: f"the shard of block {block}",
    ) -> None:
        self.run_plan = run_plan
        self.load = load
        self.device = device
        self.where = where
        self._number: int | None = None
        self._model: BlockModel | None = None

    def __call__(self, block: int) -> BlockModel:
        """The model of a block; the one before is let go first."""
        if self._model is None or block != self._number:
            self._model = None
            self._model = load_model(self.run_plan, block, self.load, self.where).to(self.device)
            self._number = block
        return self._model


def levels_of(run_plan: RunPlan, steps: int, spacing: Spacing) -> tuple[float, ...]:
    """Falling levels of `steps` evaluations over the whole range of a run.

    Raises:
        ConfigError: the steps cannot be shared by the slices.
    """
    ranges = run_plan.ranges
    if spacing == "karras":
        return tuple(karras_schedule(ranges.edges[-1], ranges.edges[0], steps))
    if steps % ranges.blocks:
        raise ConfigError(
            f"{steps} steps cannot be shared evenly by {ranges.blocks} slices: take a multiple of {ranges.blocks}, "
            "or the spacing karras"
        )
    return tuple(run_plan.noise().schedule(ranges, steps // ranges.blocks))


@torch.no_grad()
def draw(
    run_plan: RunPlan,
    block_at: BlockAt,
    labels: Tensor,
    shape: Sequence[int],
    plan: Plan,
    batch_size: int,
    count: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Samples (N, *shape), float32, one for each label (N,), on the labels' device.

    Sample i is a function of (plan, i, label). All batches walk down the levels together, so that each block is asked
    for once, however many batches there are. `count` is told how many levels are done, and of how many.
    """
    noise = run_plan.noise()
    key = torch.tensor(derive_seed(plan.seed, "sample"), device=labels.device)
    positions = torch.arange(len(labels), device=labels.device)
    chains = []
    for part in torch.split(positions, batch_size):
        start = noise.prior(tuple(shape), Draws(key, part))
        denoise = _denoiser(run_plan, block_at, labels, part, plan)
        chains.append(chain(denoise, noise, run_plan.ranges, plan.levels, start, plan.solver))
    last: tuple[Tensor, ...] = ()
    for done, evaluations in enumerate(zip(*chains, strict=True), 1):
        last = tuple(evaluation.denoised for evaluation in evaluations)
        count(done, len(plan.levels))
    return torch.cat(last)


def _denoiser(run_plan: RunPlan, block_at: BlockAt, labels: Tensor, part: Tensor, plan: Plan) -> Denoise:
    """Of the samples with these numbers, `part` of all that `labels` has."""
    ranges, overlap = run_plan.ranges, run_plan.config.noise.overlap

    def estimate(number: int, noisy: Tensor, level: Tensor, context: Tensor) -> Tensor:
        model, layers = block_at(number), run_plan.runs(number)
        output = model.predict(layers, noisy, level, context)
        if plan.guidance != 1:
            free = model.predict(layers, noisy, level, model.unconditional(context))
            output = guide(output, free, plan.guidance)
        return model.denoised(output)

    def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        context = (_scrambled(labels, float(level[0]), plan.seed) if plan.scrambled else labels)[part]
        asked = ranges.trained_at(float(level[0]), overlap) if plan.blend else (block,)
        numbers = [plan.order[b] if plan.order else b for b in asked]
        denoised = torch.stack([estimate(number, noisy, level, context) for number in numbers]).mean(dim=0)
        return denoised, denoised

    return denoise


def _scrambled(labels: Tensor, level: float, seed: int) -> Tensor:
    """Labels (N,) of other samples, others at every level; of all samples, as those of a batch may be of one class."""
    key = torch.tensor(derive_seed(seed, "scrambled", level.hex()), device=labels.device)
    order = Draws(key, torch.arange(len(labels), device=labels.device)).uniform((), 0).argsort(stable=True)
    return labels[partners(order)]
