"""The merged model: every block with its own stem and head, run one after the other down the noise range."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dbtrain.evaluation.blocks import Blocks
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch, BlockModel, Example
from dbtrain.method.sampler import Denoise, Evaluation, chain
from dbtrain.models.registry import own_architecture
from dbtrain.run.plan import RunPlan
from dbtrain.telemetry.counting import Count, silent

T = TypeVar("T")

WAITING = 2 << 30
"""Bytes of batches that wait for their turn while a block that was read for all of them computes others."""


class MergedModel:
    """All blocks in memory, or one at a time, or all in processes of a cluster.

    Args:
        run_plan: plan of the run.
        blocks: its blocks, wherever they are.
        device: device of what they are given and of their answers.
    """

    def __init__(self, run_plan: RunPlan, blocks: Blocks, device: torch.device) -> None:
        self.device = device
        self.run_plan = run_plan
        self.blocks = blocks

    count: Count = staticmethod(silent)
    """A function that is told how far a measurement of this model has come."""
    progress = ""
    """What `progress_of` says of this model."""
    weights_hash = ""
    """What `MergedDirectory.weights_hash` says of this model."""

    def __enter__(self) -> "MergedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster of a pipeline; the model cannot be used any more."""
        self.blocks.close()

    def groups(self, batches: Sequence[T], each: int) -> list[Sequence[T]]:
        """Batches that walk down the chain side by side, so that a block is read once for all of a group.

        One batch makes a group where all blocks are in memory; else they are as many as may wait.

        Args:
            batches: the batches, or what they are made from.
            each: bytes that a batch holds while it waits.
        """
        self.blocks.expect(max(map(len, batches), default=0))  # type: ignore[arg-type]
        size = 1 if self.blocks.all_here else max(1, WAITING // max(1, each))
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def side_by_side(self, walks: Sequence[Iterator[T]]) -> list[list[T]]:
        """What each walk gives."""
        along: list[list[T]] = [[] for _ in walks]
        self.blocks.walks.run(walks, lambda number, given: along[number].append(given))
        return along

    def evaluations(self, batch: Batch, draws: Draws, steps_per_block: int = 1, rotate: int = 0) -> list[Evaluation]:
        """Every evaluation along the chain for a batch of N samples; see :meth:`walk`."""
        return list(self.walk(batch, draws, steps_per_block, rotate))

    def walk(self, batch: Batch, draws: Draws, steps_per_block: int = 1, rotate: int = 0) -> Iterator[Evaluation]:
        """Every evaluation along the chain for a batch of N samples, each when it is asked for;
        `draws` make the noise it starts from, if any.

        `rotate` moves every block that many places towards the start of the chain: a control that shows what
        the order of the blocks is worth.
        """
        run_plan, noise = self.run_plan, self.run_plan.noise()
        example = self.example(batch)
        start = noise.prior(tuple(example.clean.shape[1:]), draws)
        if run_plan.config.evaluation.start == "zero":
            start = noise.centre(start)
        levels, shape = chain_levels(run_plan, steps_per_block), noise.level_shape(example)
        denoise = self.denoiser(example.context, rotate)
        return chain(denoise, noise, run_plan.ranges, levels, start, level_shape=shape, draws=draws)

    def on_true_codes(
        self, batch: Batch, others: Batch, draws: Draws, steps_per_block: int = 1
    ) -> Iterator[Evaluation]:
        """The chain's evaluations, each on the true target of `batch` noised as in training,
        and what `others` shows.

        A control: it tells how much of the answer is left in the noise.
        """
        noise, example = self.run_plan.noise(), self.example(batch)
        denoise = self.denoiser(self.example(others).context)
        for value in chain_levels(self.run_plan, steps_per_block):
            level = torch.full((len(example.clean), *noise.level_shape(example)), value, device=self.device)
            noisy = noise.corrupt(example.clean, level, draws)
            block = self.run_plan.ranges.owner(value)
            yield Evaluation(block, value, *denoise(block, noisy, level), noisy)

    def draws(self, positions: Tensor, seed: int = 0) -> Draws:
        """The randomness for the samples of these numbers (N,) in their split, however the split is cut into
        batches."""
        key = derive_seed(self.run_plan.config.seed, "evaluation", seed)
        return Draws(torch.tensor(key, device=self.device), positions.to(self.device))

    def example(self, batch: Batch) -> Example:
        """A batch in the terms of the method, as every block reads it."""
        # a class that is not ours may need its weights to read a batch
        own = own_architecture(self.run_plan.config.model.arch) is not None
        reader: BlockModel = self.blocks[0] if own else self.blocks.shells[0]
        return reader.example(batch)

    def denoiser(self, context: Tensor, rotate: int = 0) -> Denoise:
        """(block, noisy, level) -> (output, denoised) of that block on this context (N, ...).

        With `rotate`, the block that many places later is asked instead.
        """

        def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            number = (block + rotate) % len(self.blocks)
            model = self.blocks[number]
            output = model.predict(self.run_plan.runs(number), noisy, level, context)
            return output, model.denoised(output)

        return denoise


def chain_levels(run_plan: RunPlan, steps_per_block: int) -> list[float]:
    """Levels of the evaluations along the chain, as many in every slice."""
    return run_plan.noise().schedule(run_plan.ranges, steps_per_block)


def probabilities(evaluation: Evaluation) -> tuple[int, Tensor]:
    """The block that was asked, and its probabilities (N, ..., outcomes)."""
    return evaluation.block, evaluation.output.float().softmax(dim=-1)


def readouts(evaluations: Sequence[Evaluation]) -> dict[str, Tensor]:
    """Probabilities (N, ..., outcomes) by readout: ``chain``, ``mean``, ``first`` and ``after_<block>``."""
    return read_out([probabilities(evaluation) for evaluation in evaluations])


def read_out(along: Sequence[tuple[int, Tensor]]) -> dict[str, Tensor]:
    """The same readouts of numbers (...) along the chain, such as probabilities, each with its block."""
    numbers = [number for _, number in along]
    named = {f"after_{block}": number for block, number in along}
    return {"chain": numbers[-1], "mean": torch.stack(numbers).mean(dim=0), "first": numbers[0], **named}
