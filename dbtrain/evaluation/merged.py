"""The merged model: every block with its own stem and head, run one after the other down the noise range."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch, BlockModel
from dbtrain.method.sampler import Evaluation, chain, schedule
from dbtrain.method.split import local_name
from dbtrain.shards.merged import load_block, load_codebook, read_config
from dbtrain.shards.store import Store
from dbtrain.training.blueprint import Blueprint, make_distribution, read_blueprint

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
        self.blocks = [load_model(blueprint, b, load(b)).to(device) for b in range(blueprint.split.blocks)]

    @staticmethod
    def read(merged: Store, device: torch.device) -> "MergedModel":
        """Read a merged directory by its index, verified.

        Raises:
            ShardError: something is missing or damaged.
        """
        manifest = read_config(merged)
        blueprint = read_blueprint(manifest, load_codebook(merged))
        return MergedModel(blueprint, lambda block: load_block(merged, block), device)

    def evaluations(self, batch: Batch, seed: int, steps_per_block: int = 1) -> list[Evaluation]:
        """Every evaluation along the chain for a batch of N samples; `seed` makes the noise it starts from, if any."""
        return list(self.walk(batch, seed, steps_per_block))

    def draws(self, seed: int, count: int) -> Draws:
        """The randomness of a walk over `count` samples."""
        key = derive_seed(self.blueprint.config.seed, "evaluation", seed)
        return Draws(torch.tensor(key, device=self.device), torch.arange(count, device=self.device))

    def walk(self, batch: Batch, seed: int, steps_per_block: int = 1) -> Iterator[Evaluation]:
        """The evaluations one by one, so that long walks need not be kept."""
        blueprint, noise = self.blueprint, self.blueprint.noise()
        models = [cast(BlockModel, model) for model in self.blocks]
        example = models[0].example(batch)
        draws = self.draws(seed, len(example.clean))
        start = noise.prior(tuple(example.clean.shape[1:]), draws)
        if blueprint.config.evaluation.start == "zero":
            start = noise.centre(start)
        levels = chain_levels(blueprint, steps_per_block)

        def denoise(block: int, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            model = models[block]
            hidden = model.run(blueprint.split.layers(block), noisy, level, example.context)
            output = model.readout(hidden, noisy, level)
            return output, model.denoised(output)

        shape = noise.level_shape(example)
        return chain(denoise, noise, blueprint.ranges, levels, start, level_shape=shape, draws=draws)


def chain_levels(blueprint: Blueprint, steps_per_block: int) -> list[float]:
    """Levels of the evaluations along the chain, as many in every slice."""
    known = blueprint.distribution["kind"] != "none"
    distribution = make_distribution(blueprint.distribution) if known else None
    # without noise there is one level, and the same prediction however often it is asked for
    return schedule(blueprint.ranges, distribution, steps_per_block if known else 1)


def load_model(blueprint: Blueprint, block: int, tensors: dict[str, Tensor]) -> nn.Module:
    """One block's model with the tensors of its shard, which are named as in the whole model."""
    model = blueprint.model(block)
    model.load_state_dict({local_name(block, name): tensor for name, tensor in tensors.items()}, strict=True)
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
    with torch.no_grad():
        pairs = zip(merged.evaluations(batch, 0), apart.evaluations(batch, 0), strict=True)
        return [
            f"block {ours.block} at sigma {ours.level:g} differs from its checkpoint"
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
