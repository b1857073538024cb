import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import LabelledImages
from dbtrain.data.tokenizers import Letters
from dbtrain.errors import ConfigError
from dbtrain.evaluation.blocks import AllBlocks
from dbtrain.evaluation.text.elbo import block_nats, elbo_bits
from dbtrain.method.interface import Example
from dbtrain.method.levels import Uniform
from dbtrain.method.masking import MaskingNoise
from dbtrain.method.ranges import equal_shares
from dbtrain.method.split import split_evenly
from dbtrain.telemetry.counting import silent

MASK = 4


class Twins:
    """Knows all about texts of pairs of equal tokens: a masked one is told by its twin, or is one of four alike."""

    def example(self, batch, draws=None):
        return Example(batch["tokens"], batch["tokens"][:, :0], batch["tokens"])

    def predict(self, layers, noisy, level, context):
        seen = noisy.view(len(noisy), -1, 2).min(dim=2).values.repeat_interleave(2, dim=1)
        told = torch.nn.functional.one_hot(seen.clamp(max=3), 4).float().log()
        return torch.where((seen == MASK)[..., None], torch.zeros(4), told)

    def loss(self, output, target):
        return torch.nn.functional.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


def texts(pairs=1, characters=1):
    """3,000 texts of one letter, repeated; each token stands for so many characters."""
    tokens = (np.arange(3000, dtype=np.uint8) % 4).repeat(2 * pairs)
    tokenizer = Letters()
    tokenizer.characters = lambda row: characters * len(row)
    return TokenWindows(tokens, 2 * pairs, tokenizer)


def section(batch_size=1000, steps=2, most=None):
    return SimpleNamespace(batch_size=batch_size, steps_per_block=steps, texts=most)


def merged(blocks):
    run_plan = SimpleNamespace(
        split=split_evenly(6, blocks),
        runs=split_evenly(6, blocks).layers,
        ranges=equal_shares(Uniform(), blocks),
        noise=lambda: MaskingNoise(MASK),
        config=SimpleNamespace(seed=0),
        shape={"length": 2, "vocabulary": 4},
    )
    return SimpleNamespace(
        run_plan=run_plan,
        blocks=AllBlocks([Twins()] * blocks, torch.device("cpu")),
        device=torch.device("cpu"),
        count=silent,
    )


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_bits_of_texts_whose_entropy_is_known(blocks):
    bits = elbo_bits(merged(blocks), texts(), section())
    # two bits for two tokens; by hand, the integral of 2t over the slice, times that
    assert bits["total"] == pytest.approx(1, abs=0.02)
    expected = [(1 - b / blocks) ** 2 - (1 - (b + 1) / blocks) ** 2 for b in range(blocks)]
    assert [bits[f"block_{b}"] for b in range(blocks)] == pytest.approx(expected, abs=0.02)
    assert bits["total"] == pytest.approx(sum(bits[f"block_{b}"] for b in range(blocks)))
    # the batch is a matter of memory only
    assert elbo_bits(merged(blocks), texts(), section(batch_size=700)) == pytest.approx(bits)


def test_bits_are_a_character_and_fewer_texts_can_be_measured():
    whole = elbo_bits(merged(2), texts(), section())["total"]
    assert elbo_bits(merged(2), texts(characters=4), section())["total"] == pytest.approx(whole / 4)
    few = elbo_bits(merged(2), texts(), section(most=600))["total"]
    assert few != whole and few == pytest.approx(whole, abs=0.1)


def test_what_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="measured on text"):
        elbo_bits(merged(1), LabelledImages(torch.zeros(2, 1, 1, 1), torch.zeros(2), 1), section())


def test_levels_spread_evenly_vary_far_less_than_independent_ones():
    indices, pairs = torch.arange(400), 64
    totals = []
    for seed in range(20):
        model = merged(1)
        model.run_plan.config.seed = seed
        totals.append(float(block_nats(model, 0, texts(pairs).batch(indices, torch.device("cpu")), indices, 1).mean()))
    evenly = torch.tensor(totals) / (2 * pairs)
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(20, 400, 1, generator=generator)
    both = torch.rand(20, 400, pairs, generator=generator) < t**2
    independent = (both / t * math.log(4)).mean(dim=(1, 2))
    assert float(evenly.mean()) == pytest.approx(math.log(2), rel=0.02)
    assert float(evenly.std()) < 0.6 * float(independent.std())
