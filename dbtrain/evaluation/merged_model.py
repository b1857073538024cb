"""The merged model: every block with its own stem and head, run one after the other down the noise range."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.evaluation.loading import LoadBlock, Where, load_model, somewhere
from dbtrain.evaluation.residency import Residency, ResidentBlocks, choose
from dbtrain.evaluation.transfer import Transfer, transfer_to
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch, BlockModel, Example
from dbtrain.method.sampler import Denoise, Evaluation, chain
from dbtrain.run.newest import newest_model
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.run.run import Run
from dbtrain.shards.manifest import Manifest, read_manifest
from dbtrain.shards.merged_directory import CONFIG, MergedDirectory, unfinished
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, silent

T = TypeVar("T")

WAITING = 2 << 30
"""Bytes of batches that wait for their turn while a block that was read for all of them computes others."""


class MergedModel:
    """All blocks in memory, or one at a time.

    Args:
        run_plan: plan of the run.
        load: tensors of a block by their names in the whole model.
        device: where the blocks are put.
        where: their files, for messages.
        residency: which blocks are in memory. If not all are, a block is loaded when it is asked for, and
            kept until another one is asked for.
        transfer: how such blocks get to the device.

    Raises:
        ShardError: the tensors of a block are not those of its model, or whatever ``load`` raises; if not all
            are in memory, not before the block is asked for.
    """

    def __init__(
        self,
        run_plan: RunPlan,
        load: LoadBlock,
        device: torch.device,
        where: Where = somewhere,
        residency: Residency = "all",
        transfer: Transfer | None = None,
    ) -> None:
        self.device = device
        self.run_plan = run_plan
        self.blocks: Sequence[BlockModel]
        if residency == "all":
            self.blocks = _all_of(run_plan, load, device, where)
        else:
            self.blocks = ResidentBlocks(run_plan, load, device, where, residency == "ahead", transfer)

    count: Count = staticmethod(silent)
    """A function that is told how far a measurement of this model has come."""
    progress = ""
    """What `progress_of` says of this model."""
    weights_hash = ""
    """What `MergedDirectory.weights_hash` says of this model."""

    @staticmethod
    def read(merged: Store, device: torch.device) -> "MergedModel":
        """Read a merged directory by its index, verified; all blocks are in memory.

        Raises:
            ShardError: something is missing or damaged.
        """
        return MergedModel.of(MergedDirectory(merged), device)

    @staticmethod
    def of(
        merged: MergedDirectory, device: torch.device, residency: Residency = "all", run_plan: RunPlan | None = None
    ) -> "MergedModel":
        """The same as :meth:`read`, for a directory that is open already, and blocks that may come and go.

        Args:
            residency: which blocks are in memory.
            run_plan: plan of the run, if not as the directory has it.
        """
        run_plan = run_plan or merged_plan(merged)
        if residency == "all":
            return MergedModel(run_plan, merged.block, device, merged.where)
        transfer = transfer_to(device)
        load = partial(merged.block, to=transfer.destination)
        return MergedModel(run_plan, load, device, merged.where, residency, transfer)

    @staticmethod
    def of_run(
        run: Run,
        device: torch.device,
        merged: MergedDirectory | None = None,
        changed: Callable[[Config], Config] = lambda config: config,
    ) -> "MergedModel":
        """The merged model of a run, with the places that only run.json keeps,
        if it is there, such as its data's. `evaluation.resident` says which of its blocks are in memory.

        Args:
            run: the run.
            device: device of the blocks.
            merged: a model of its blocks that lies elsewhere.
            changed: the configuration to use, from that of the run.

        Raises:
            ShardError: the run is not merged, or its files are damaged.
            ConfigError: what `changed` raises.
        """
        merged = merged or merged_of(run)
        run_plan = merged_plan(merged)
        if run.exists and _same_run(run.manifest, merged.manifest):
            located = read_plan(run.manifest, None)
            run_plan = replace(run_plan, config=located.config, paths=located.paths)
        run_plan = replace(run_plan, config=changed(run_plan.config))
        residency = choose(run_plan.config.evaluation.resident, run_plan, merged, device)
        model = MergedModel.of(merged, device, residency, run_plan)
        model.progress, model.weights_hash = progress_of(run, merged), merged.weights_hash
        return model

    @property
    def shells(self) -> Sequence[BlockModel]:
        """The modules of the blocks, for what needs no weights: one that is not in memory has none."""
        return self.blocks.shells if isinstance(self.blocks, ResidentBlocks) else self.blocks

    @property
    def comes_and_goes(self) -> bool:
        """Whether blocks are read when they are asked for, and not all kept."""
        return isinstance(self.blocks, ResidentBlocks)

    @property
    def resident(self) -> str:
        """Which blocks are in memory and what that cost, for people."""
        if isinstance(self.blocks, ResidentBlocks):
            return self.blocks.told()
        return "its one block in memory" if len(self.blocks) == 1 else f"all {len(self.blocks)} blocks in memory"

    def groups(self, batches: Sequence[T], each: int) -> list[Sequence[T]]:
        """Batches that walk down the chain side by side, so that a block is read once for all of a group.

        One batch makes a group where all blocks are in memory; else they are as many as may wait.

        Args:
            batches: the batches, or what they are made from.
            each: bytes that a batch holds while it waits.
        """
        size = max(1, WAITING // max(1, each)) if self.comes_and_goes else 1
        return [batches[start : start + size] for start in range(0, len(batches), size)]

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
        reader = self.blocks.reader if isinstance(self.blocks, ResidentBlocks) else self.blocks[0]
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


def merged_plan(merged: MergedDirectory) -> RunPlan:
    """The plan of a merged model, with what its blocks have in common.

    Raises:
        ShardError: its files are damaged.
    """
    return read_plan(merged.manifest, merged.codebook(), merged.frozen())


def merged_of(run: Run) -> MergedDirectory:
    """The merged model of a run.

    Raises:
        ShardError: it is no run, and the message says what it is instead, or the run is not merged.
    """
    # a merged model is enough: it may have been carried here alone
    if not run.merged.exists(CONFIG):
        check_run_path(run.store)
        read_manifest(run.store)
    return MergedDirectory(run.merged)


@contextmanager
def model_of(run: Run, now: bool) -> Iterator[MergedDirectory]:
    """The merged model of a run; or, of a run that may be training, one of its newest commits.

    Raises:
        ShardError: there is none, or a block has no commit.
    """
    if not now:
        yield merged_of(run)
        return
    check_run_path(run.store)
    with newest_model(run) as merged:
        yield merged


def progress_of(run: Run, merged: MergedDirectory) -> str:
    """How far the blocks were trained, if the run is longer than that; '' for the model of a whole run."""
    longest = run.manifest if run.exists and _same_run(run.manifest, merged.manifest) else merged.manifest
    return unfinished(longest, merged.blocks)


def _same_run(ours: Manifest, theirs: Manifest) -> bool:
    """Whether both are manifests of one run, which may have been extended in between."""
    count = ours.blocks
    return count == theirs.blocks and all(ours.identity(block) == theirs.identity(block) for block in range(count))


def _all_of(run_plan: RunPlan, load: LoadBlock, device: torch.device, where: Where) -> list[BlockModel]:
    """The models of all blocks; those of the same shards are one."""
    models: dict[range, BlockModel] = {}
    for block in range(run_plan.split.blocks):
        sources = run_plan.scheme.sources(block)
        if sources not in models:
            models[sources] = load_model(run_plan, block, load, where).to(device)
    return [models[run_plan.scheme.sources(block)] for block in range(run_plan.split.blocks)]


def side_by_side(walks: Iterable[Iterator[T]]) -> list[list[T]]:
    """What each walk gives, where all of them take their first step before any takes its second."""
    return [list(given) for given in zip(*zip(*walks, strict=True), strict=True)]


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
