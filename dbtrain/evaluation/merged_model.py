"""The merged model: every block with its own stem and head, run one after the other down the noise range."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch, BlockModel, Example
from dbtrain.method.sampler import Denoise, Evaluation, chain
from dbtrain.method.split import local_name
from dbtrain.run.newest import newest_model
from dbtrain.run.plan import RunPlan, read_plan
from dbtrain.run.run import Run
from dbtrain.shards.fit import check_fit
from dbtrain.shards.manifest import Manifest, read_manifest
from dbtrain.shards.merged_directory import CONFIG, MergedDirectory, unfinished
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, silent

LoadBlock = Callable[[int], dict[str, Tensor]]
Where = Callable[[int], str]
"""The file that holds a block's tensors, for messages."""


def _somewhere(block: int) -> str:
    return f"the shard of block {block}"


class MergedModel:
    """All blocks in memory, or one at a time.

    Args:
        run_plan: plan of the run.
        load: tensors of a block by their names in the whole model.
        device: where the blocks are put.
        where: their files, for messages.
        one_at_a_time: load a block when it is asked for, and keep it until another one is asked for. This is
            slower, and needs only the memory of one block.

    Raises:
        ShardError: the tensors of a block are not those of its model, or whatever ``load`` raises; one at a
            time, not before the block is asked for.
    """

    def __init__(
        self,
        run_plan: RunPlan,
        load: LoadBlock,
        device: torch.device,
        where: Where = _somewhere,
        one_at_a_time: bool = False,
    ) -> None:
        self.device = device
        self.run_plan = run_plan
        blocks = LoadedBlocks(run_plan, load, device, where)
        self.blocks: Sequence[BlockModel] = blocks if one_at_a_time else _all_of(blocks)

    count: Count = staticmethod(silent)
    """A function that is told how far a measurement of this model has come."""
    progress = ""
    """What `progress_of` says of this model."""
    weights_hash = ""
    """What `MergedDirectory.weights_hash` says of this model."""

    @staticmethod
    def read(merged: Store, device: torch.device) -> "MergedModel":
        """Read a merged directory by its index, verified.

        Raises:
            ShardError: something is missing or damaged.
        """
        return MergedModel.of(MergedDirectory(merged), device)

    @staticmethod
    def of(merged: MergedDirectory, device: torch.device, one_at_a_time: bool = False) -> "MergedModel":
        """The same as :meth:`read`, for a directory that is open already."""
        return MergedModel(merged_plan(merged), merged.block, device, merged.where, one_at_a_time)

    @staticmethod
    def of_run(run: Run, device: torch.device, merged: MergedDirectory | None = None) -> "MergedModel":
        """The merged model of a run, with the places that only run.json keeps,
        if it is there, such as its data's.

        Args:
            run: the run.
            device: device of the blocks.
            merged: a model of its blocks that lies elsewhere.

        Raises:
            ShardError: the run is not merged, or its files are damaged.
        """
        merged = merged or merged_of(run)
        model = MergedModel.of(merged, device)
        model.progress, model.weights_hash = progress_of(run, merged), merged.weights_hash
        if run.exists and _same_run(run.manifest, merged.manifest):
            located = read_plan(run.manifest, None)
            model.run_plan = replace(model.run_plan, config=located.config, paths=located.paths)
        return model

    def evaluations(self, batch: Batch, draws: Draws, steps_per_block: int = 1, rotate: int = 0) -> list[Evaluation]:
        """Every evaluation along the chain for a batch of N samples;
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
        return list(chain(denoise, noise, run_plan.ranges, levels, start, level_shape=shape, draws=draws))

    def on_true_codes(self, batch: Batch, others: Batch, draws: Draws, steps_per_block: int = 1) -> list[Evaluation]:
        """The chain's evaluations, each on the true target of `batch` noised as in training,
        and what `others` shows.

        A control: it tells how much of the answer is left in the noise.
        """
        noise, example = self.run_plan.noise(), self.example(batch)
        denoise = self.denoiser(self.example(others).context)
        evaluations = []
        for value in chain_levels(self.run_plan, steps_per_block):
            level = torch.full((len(example.clean), *noise.level_shape(example)), value, device=self.device)
            noisy = noise.corrupt(example.clean, level, draws)
            block = self.run_plan.ranges.owner(value)
            evaluations.append(Evaluation(block, value, *denoise(block, noisy, level), noisy))
        return evaluations

    def draws(self, positions: Tensor, seed: int = 0) -> Draws:
        """The randomness for the samples of these numbers (N,) in their split, however the split is cut into
        batches."""
        key = derive_seed(self.run_plan.config.seed, "evaluation", seed)
        return Draws(torch.tensor(key, device=self.device), positions.to(self.device))

    def example(self, batch: Batch) -> Example:
        """A batch in the terms of the method, as every block reads it."""
        return self.blocks[0].example(batch)

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


class LoadedBlocks(Sequence[BlockModel]):
    """Each block's model, loaded when asked for; the last one is kept, for all blocks of the same shards.

    Args:
        run_plan, load, device, where: the same as in :class:`MergedModel`.
    """

    def __init__(self, run_plan: RunPlan, load: LoadBlock, device: torch.device, where: Where) -> None:
        self._run_plan = run_plan
        self._load = load
        self._device = device
        self._where = where
        self._kept: tuple[range, BlockModel] | None = None

    def __len__(self) -> int:
        return self._run_plan.split.blocks

    def __getitem__(self, block: Any) -> Any:
        number = range(len(self))[block]
        sources = self._run_plan.scheme.sources(number)
        if self._kept is None or self._kept[0] != sources:
            self._kept = None  # two at a time may not fit into memory
            self._kept = sources, load_model(self._run_plan, number, self._load, self._where).to(self._device)
        return self._kept[1]


def _all_of(blocks: LoadedBlocks) -> list[BlockModel]:
    return [blocks[block] for block in range(len(blocks))]


def load_model(run_plan: RunPlan, block: int, load: LoadBlock, where: Where = _somewhere) -> BlockModel:
    """A block's model from the shards that hold it, whose tensors are named as in the whole model.

    Raises:
        ShardError: a tensor is missing, has another shape or type, or is none of the model's.
    """
    sources = run_plan.scheme.sources(block)
    model = run_plan.model(sources[-1])
    state: dict[str, Tensor] = {name: t for name, t in model.state_dict().items() if name in run_plan.frozen}
    for shard in sources:
        # where several shards hold a name, such as a head's, the last one is the block's own
        state |= check_shard(run_plan, shard, load(shard), model.state_dict(), where(shard))
    model.load_state_dict(state, strict=True)
    return model.eval()


def check_shard(
    run_plan: RunPlan, shard: int, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Tensors of a shard by their names in its model, of which `wanted` is the state;
    ShardError if they misfit it."""
    wanted = {name: tensor for name, tensor in wanted.items() if name not in run_plan.frozen}
    named = {local_name(shard, name): tensor for name, tensor in tensors.items()}
    layers = run_plan.shards.layers(shard)
    # in greedy training, the stem belongs to the first block, and earlier layers to the earlier blocks
    borrows = run_plan.scheme.in_turn and shard > 0

    def holds(name: str) -> bool:
        group, number = name.split(".", 2)[:2]
        return int(number) in layers if group == "layers" else not (borrows and group == "stem")

    required = frozenset(filter(holds, wanted))
    check_fit(named, wanted, required, shard, where)
    return named


def readouts(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Class probabilities (N, classes) by readout: ``chain``, ``mean``, ``first`` and ``after_<block>``."""
    probabilities = [evaluation.output.float().softmax(dim=-1) for evaluation in evaluations]
    named = {f"after_{e.block}": p for e, p in zip(evaluations, probabilities, strict=True)}
    return {
        "chain": probabilities[-1],
        "mean": torch.stack(probabilities).mean(dim=0),
        "first": probabilities[0],
        **named,
    }
