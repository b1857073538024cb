"""Draw samples from a merged model, class by class: each step runs the block that owns its level."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.config.evaluation import AnySolver, EvaluationConfig
from dbtrain.data.splits import partners
from dbtrain.evaluation.images.schedulers import check_solver, scheduled_chain
from dbtrain.evaluation.pipeline.walks import InStep, Walks
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import BlockModel
from dbtrain.method.sampler import Evaluation, chain, guide, spaced_levels
from dbtrain.run.plan import RunPlan

BlockAt = Callable[[int], BlockModel]
"""Model of a block, on the device."""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    levels: tuple[float, ...]
    """Falling noise levels, one evaluation each (two with Heun, but for the last)."""
    solver: AnySolver = "euler"
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 for none, which spares the unconditional evaluations."""
    seed: int = 0
    order: tuple[int, ...] | None = None
    """Block that is asked for each slice, the owner by default; another order is a control."""
    blend: bool = False
    """Average the estimates of all blocks that were trained at a level:
    near a boundary, of both neighbours."""
    scrambled: bool = False
    """A control: give each sample the class of another sample, of another one at every level."""

    @staticmethod
    def of(run_plan: RunPlan, section: EvaluationConfig, seed: int) -> "Sampling":
        """As a section `evaluation` says.

        Raises:
            ConfigError: the solver does not fit the noise, or the steps cannot be shared by the slices.
        """
        check_solver(section.solver, run_plan.config.noise_process)
        levels = spaced_levels(run_plan.noise(), run_plan.ranges, section.steps, section.spacing)
        return Sampling(levels, section.solver, section.guidance, seed)


@torch.no_grad()
def draw(
    run_plan: RunPlan,
    block_at: BlockAt,
    labels: Tensor,
    shape: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    count: Callable[[int, int], None] = lambda done, of: None,
    seen: Callable[[Evaluation], None] = lambda evaluation: None,
    walks: Walks | None = None,
) -> Tensor:
    """Samples (N, *shape), float32, one for each label (N,), on the labels' device.

    Sample i is a function of (sampling, i, label). All batches walk down the levels together, so that each
    block is asked for once, however many batches there are, or as `walks` says. `count` is told how many
    levels are done, and `seen` gets the first batch's evaluation at each level.
    """
    batches = torch.split(torch.arange(len(labels), device=labels.device), batch_size)
    chains = [_chain(SampleDenoiser(run_plan, block_at, sampling, labels, batch), shape) for batch in batches]
    denoised: dict[int, Tensor] = {}
    steps = 0

    def note(number: int, evaluation: Evaluation) -> None:
        nonlocal steps
        denoised[number], steps = evaluation.denoised, steps + 1
        if number == 0:
            seen(evaluation)
        if steps % len(chains) == 0:
            count(steps // len(chains), len(sampling.levels))

    (walks or InStep()).run(chains, note)
    return torch.cat([denoised[number] for number in range(len(chains))])


class SampleDenoiser:
    """The denoiser that a solver calls for one batch: it applies the right blocks, classes and guidance.

    Args:
        run_plan: plan of the run.
        block_at: its blocks.
        sampling: how samples are drawn.
        labels: (N,) of all samples.
        batch: (n,) numbers of this batch's samples among them.
    """

    def __init__(self, run_plan: RunPlan, block_at: BlockAt, sampling: Sampling, labels: Tensor, batch: Tensor) -> None:
        self.run_plan, self.block_at, self.sampling = run_plan, block_at, sampling
        self.labels, self.batch = labels, batch

    def __call__(self, owner: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(output, estimate) at a level (n,) of the owner's slice; both are the same tensor (n, ...)."""
        classes = self._classes(level)
        estimates = [self._estimate(block, noisy, level, classes) for block in self._blocks(owner, level)]
        denoised = estimates[0] if len(estimates) == 1 else torch.stack(estimates).mean(dim=0)
        return denoised, denoised

    def _blocks(self, owner: int, level: Tensor) -> list[int]:
        """Blocks whose estimates are averaged: the owner, or under `blend` all that were trained there."""
        overlap, order = self.run_plan.config.noise.overlap, self.sampling.order
        # reading the level waits for the GPU, so it is read only under `blend`
        trained = self.run_plan.ranges.trained_at(float(level[0]), overlap) if self.sampling.blend else (owner,)
        return [order[block] if order else block for block in trained]

    def _classes(self, level: Tensor) -> Tensor:
        """Classes (n,) that the blocks are told."""
        labels, seed = self.labels, self.sampling.seed
        return (scrambled(labels, float(level[0]), seed) if self.sampling.scrambled else labels)[self.batch]

    def _estimate(self, block: int, noisy: Tensor, level: Tensor, classes: Tensor) -> Tensor:
        """A block's estimate; with guidance it is asked a second time, without the classes."""
        model, layers, scale = self.block_at(block), self.run_plan.runs(block), self.sampling.guidance
        output = model.predict(layers, noisy, level, classes)
        if scale != 1:
            output = guide(output, model.predict(layers, noisy, level, model.unconditional(classes)), scale)
        return model.denoised(output)


def _chain(denoiser: SampleDenoiser, shape: Sequence[int]) -> Iterator[Evaluation]:
    """A batch's evaluations down the levels; its first noise follows from the seed and sample numbers."""
    run_plan, sampling = denoiser.run_plan, denoiser.sampling
    key = torch.tensor(derive_seed(sampling.seed, "sample"), device=denoiser.batch.device)
    noise = run_plan.noise()
    start = noise.prior(tuple(shape), Draws(key, denoiser.batch))
    if sampling.solver == "euler" or sampling.solver == "heun":
        return chain(denoiser, noise, run_plan.ranges, sampling.levels, start, sampling.solver)
    process = run_plan.config.noise_process
    return scheduled_chain(denoiser, process, run_plan.ranges, sampling.levels, start, sampling.solver)


def scrambled(labels: Tensor, level: float, seed: int) -> Tensor:
    """Labels (N,) of other samples, different ones at every level. They are drawn from all samples, because
    those of a batch may be of one class."""
    key = torch.tensor(derive_seed(seed, "scrambled", level.hex()), device=labels.device)
    order = Draws(key, torch.arange(len(labels), device=labels.device)).uniform((), 0).argsort(stable=True)
    return labels[partners(order)]
