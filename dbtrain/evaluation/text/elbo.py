"""The ELBO of a masked diffusion language model, in bits: the sum of the shares of its blocks."""

import math
from itertools import accumulate

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import Split
from dbtrain.errors import ConfigError
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.text.bits import batches
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.interface import Batch
from dbtrain.telemetry.counting import counted


def elbo_bits(model: MergedModel, split: Split, section: EvaluationConfig) -> dict[str, float]:
    """Bits a character, an upper bound of -log2 p: ``total`` and each block's share ``block_<b>``.

    The integral over the masked share t splits at the blocks' edges, so total = sum of the shares  # MD4, eq.
    (4). Each text is seen at `steps_per_block` levels of every block, spread evenly over its slice and over
    the texts.

    Raises:
        ConfigError: the split is no text.
    """
    if not isinstance(split, TokenWindows):
        raise ConfigError("bits per character are measured on text, and this data is none")
    nats = torch.zeros(model.run_plan.split.blocks, dtype=torch.float64)
    texts = batches(split, section, model)
    characters = sum(split.characters(indices) for indices in texts)
    starts = [0, *accumulate(len(indices) for indices in texts)]
    # block after block, so that each is read once if not all are in memory
    work = [(block, number) for block in range(len(nats)) for number in range(len(texts))]

    def measure(one: tuple[int, int]) -> float:
        block, number = one
        batch = split.batch(texts[number], model.device)
        positions = starts[number] + torch.arange(len(texts[number]))
        return float(block_nats(model, block, batch, positions, section.steps_per_block).sum())

    model.blocks.expect(max(map(len, texts), default=0))
    with torch.no_grad():
        measured = model.blocks.walks.each(measure, work)
        for block, _ in counted(model.count, "batches of text read by a block", work):
            nats[block] += next(measured)
    shares = (nats / characters / math.log(2)).tolist()
    return {"total": sum(shares), **{f"block_{block}": share for block, share in enumerate(shares)}}


def block_nats(model: MergedModel, block: int, batch: Batch, positions: Tensor, levels: int) -> Tensor:
    """Estimate (N,) float64 of a block's share of the ELBO of each sample, in nats.

    Args:
        model: the merged model.
        block: its number.
        batch: N samples.
        positions: (N,) numbers of the samples among all that are measured; levels and masks follow from them.
        levels: levels for each sample.
    """
    network, noise = model.blocks[block], model.run_plan.noise()
    example, layers = network.example(batch), model.run_plan.runs(block)
    low, high = noise.cdf(torch.tensor(model.run_plan.ranges.of(block), dtype=torch.float64)).tolist()
    total = torch.zeros(len(positions), dtype=torch.float64, device=model.device)
    for number in range(levels):
        key = derive_seed(model.run_plan.config.seed, "elbo", block, number)
        draws = Draws(torch.tensor(key, device=model.device), positions.to(model.device))
        share = (number + noise.draw_uniforms(example, draws)) / levels
        level = noise.quantile(low + share * (high - low))
        noisy = noise.corrupt(example.clean, level, draws)
        output = network.predict(layers, noisy, level, example.context)
        total += (noise.weight(level) * network.loss(output.float(), example.target)).double()
    # the loss is that of one token; the integral over the slice is the mean times the slice's width
    return (high - low) * total / levels * example.target.shape[1]
