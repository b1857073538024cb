"""The merged model: every block with its own stem and head, run one after the other down the noise range."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch, BlockModel, Example
from dbtrain.method.sampler import Denoise, Evaluation, chain
from dbtrain.method.split import local_name
from dbtrain.shards.merged import load_block, load_codebook, read_config
from dbtrain.shards.store import Store
from dbtrain.training.blueprint import Blueprint, read_blueprint

LoadBlock = Callable[[int], dict[str, Tensor]]


class MergedModel:
    """All blocks in memory.

    Args:
        blueprint: of the run.
        load: tensors of a block by their names in the whole model.
        device: where the blocks are put.
    """

    def __init__(self, blueprint: Blueprint, load: LoadBlock, device: torch.device) -> None:
        self.device = device
        self.blueprint = blueprint
        self.blocks = _load_blocks(blueprint, load, device)

    @staticmethod
    def read(merged: Store, device: torch.device) -> "MergedModel":
        """Read a merged directory by its index, verified.

        Raises:
            ShardError: something is missing or damaged.
        """
        manifest = read_config(merged)
        blueprint = read_blueprint(manifest, load_codebook(merged))
        return MergedModel(blueprint, lambda block: load_block(merged, block), device)

    def evaluations(self, batch: Batch, draws: Draws, steps_per_block: int = 1, rotate: int = 0) -> list[Evaluation]:
        """Every evaluation along the chain for a batch of N samples; `draws` make the noise it starts from, if any.

        `rotate` puts every block into the place of the one so many before it: a control of what the order gives.
        """
        blueprint, noise = self.blueprint, self.blueprint.noise()
        example = self._example(batch)
        start = noise.prior(tuple(example.clean.shape[1:]), draws)
        if blueprint.config.evaluation.start == "zero":
            start = noise.centre(start)
        levels, shape = chain_levels(blueprint, steps_per_block), noise.level_shape(example)
        denoise = self._denoiser(example.context, rotate)
        return list(chain(denoise, noise, blueprint.ranges, levels, start, level_shape=shape, draws=draws))

    def on_true_codes(self, batch: Batch, others: Batch, draws: Draws, steps_per_block: int = 1) -> list[Evaluation]:
        """The chain's evaluations, each on the true target of `batch` noised as in training, and what `others` shows.

        A control: it tells how much of the answer is left in the noise.
        """
        noise, example = self.blueprint.noise(), self._example(batch)
        denoise = self._denoiser(self._example(others).context)
        found = []
        for value in chain_levels(self.blueprint, steps_per_block):
            level = torch.full((len(example.clean), *noise.level_shape(example)), value, device=self.device)
            noisy = noise.corrupt(example.clean, level, draws)
            block = self.blueprint.ranges.owner(value)
            found.append(Evaluation(block, value, *denoise(block, noisy, level), noisy))
        return found

    def draws(self, positions: Tensor, seed: int = 0) -> Draws:
        """The randomness of a walk over the samples of these numbers (N,) in their split, however it is cut."""
        key = derive_seed(self.blueprint.config.seed, "evaluation", seed)
        return Draws(torch.tensor(key, device=self.device), positions.to(self.device))

    def _example(self, batch: Batch) -> Example:
        return self.blocks[0].example(batch)

    def _denoiser(self, context: Tensor, rotate: int = 0) -> Denoise:
        """Each block, or the one so many after it, on this context."""

        def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            held = (block + rotate) % len(self.blocks)
            model = self.blocks[held]
            output = model.predict(self.blueprint.runs(held), noisy, level, context)
            return output, model.denoised(output)

        return denoise


def chain_levels(blueprint: Blueprint, steps_per_block: int) -> list[float]:
    """Levels of the evaluations along the chain, as many in every slice."""
    return blueprint.noise().schedule(blueprint.ranges, steps_per_block)


def _load_blocks(blueprint: Blueprint, load: LoadBlock, device: torch.device) -> list[BlockModel]:
    """Each block's model; blocks that are held by the same shards are one model."""
    sources = [blueprint.scheme.sources(block) for block in range(blueprint.split.blocks)]
    models = {own: load_model(blueprint, block, load).to(device) for block, own in enumerate(sources)}
    return [models[own] for own in sources]


def load_model(blueprint: Blueprint, block: int, load: LoadBlock) -> BlockModel:
    """A block's model from the shards that hold it, whose tensors are named as in the whole model."""
    sources = blueprint.scheme.sources(block)
    model = blueprint.model(sources[-1])
    # of a name that several hold, a head's, the last is the block's own
    state = {local_name(shard, name): tensor for shard in sources for name, tensor in load(shard).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def verify(merged: MergedModel, load: LoadBlock, batch: Batch) -> list[str]:
    """Run both sides: each block from its own checkpoint against the merged model, bit for bit.

    Args:
        load: tensors of a block's own checkpoint.
        batch: samples to run.

    Returns:
        One line for each block whose output differs.
    """
    apart = MergedModel(merged.blueprint, load, merged.device)
    draws = merged.draws(torch.arange(len(next(iter(batch.values())))))
    name = merged.blueprint.noise().level_name
    with torch.no_grad():
        pairs = zip(merged.evaluations(batch, draws), apart.evaluations(batch, draws), strict=True)
        return [
            f"block {ours.block} at {name} {ours.level:g} differs from its checkpoint"
            for ours, theirs in pairs
            if not torch.equal(ours.output, theirs.output)
        ]


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
