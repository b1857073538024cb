import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.levels import Uniform
from dbtrain.method.masking import MaskingNoise
from dbtrain.method.ranges import equal_shares, explicit
from dbtrain.method.sampler import chain, schedule

MASK = 5
NOISE = MaskingNoise(MASK)


def draws(count, key=3):
    return Draws(torch.tensor(key), torch.arange(count))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6])
def test_blocks_are_equal_decrements_of_alpha_and_block_0_owns_the_most_masked(blocks):
    ranges = equal_shares(Uniform(), blocks)
    assert ranges.edges == pytest.approx([1 - b / blocks for b in range(blocks + 1)])
    assert ranges.edges[0] == 1 and ranges.edges[-1] == 0
    edges = torch.tensor(ranges.edges[:-1], dtype=torch.float64)
    # half open: the level at which a slice is entered, its upper edge, is the block's own
    assert ranges.block_of(edges).tolist() == list(range(blocks))
    assert ranges.block_of(edges.nextafter(torch.tensor(2.0, dtype=torch.float64)))[1:].tolist() == list(
        range(blocks - 1)
    )
    assert int(ranges.block_of(torch.tensor(1e-9))) == blocks - 1


def test_edges_from_1_down_to_0_can_be_given():
    assert explicit((1.0, 0.5, 0.0), 2).of(1) == (0.0, 0.5)
    with pytest.raises(ConfigError, match="do not tile"):
        explicit((1.0, 0.5, -0.1), 2)


def test_a_share_t_of_the_tokens_is_masked_and_the_rest_is_untouched():
    clean = torch.randint(5, (2000, 40), generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat_interleave(500)
    noisy = NOISE.corrupt(clean, level, draws(2000))
    assert torch.equal(noisy[noisy != MASK], clean[noisy != MASK])
    shares = (noisy == MASK).float().view(4, -1).mean(dim=1)
    assert shares.tolist() == pytest.approx([0, 0.1, 0.5, 1], abs=0.01)
    assert shares[0] == 0 and shares[3] == 1
    # independently: half of the neighbours of a masked token are masked at t = 1/2
    hidden = (noisy == MASK)[1000:1500]
    assert float((hidden[:, 1:] & hidden[:, :-1]).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_weight_times_density_of_the_levels_is_the_elbos():
    level = torch.tensor([0.01, 0.25, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    quantile = NOISE.cdf(level)
    (density,) = torch.autograd.grad(quantile.sum(), level)
    assert torch.allclose(NOISE.weight(level) * density, 1 / level)
    assert torch.allclose(NOISE.quantile(quantile.detach()), level.detach().float())
    assert NOISE.cdf(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize(("level", "following"), [(1.0, 0.75), (0.5, 0.1), (0.3, 0.0)])
def test_a_step_reveals_the_share_that_belongs_to_it_and_draws_from_the_prediction(level, following):
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.2, 0.0])
    noisy = torch.full((4000, 10), MASK)
    noisy[:, 5:] = 2
    t, s = torch.full((4000,), level), torch.full((4000,), following)
    got = NOISE.step(noisy, probabilities.expand(4000, 10, 5), t, s, draws(4000))
    assert torch.equal(got[:, 5:], noisy[:, 5:])
    revealed = got[:, :5][got[:, :5] != MASK]
    assert len(revealed) / 20000 == pytest.approx(1 - following / level, abs=0.01)
    shares = torch.bincount(revealed, minlength=5) / len(revealed)
    assert shares.tolist() == pytest.approx(probabilities.tolist(), abs=0.02)
    assert shares[2] == shares[4] == 0


def test_probabilities_that_do_not_quite_sum_to_one_never_draw_the_mask():
    got = NOISE.step(
        torch.full((500, 64), MASK), torch.full((500, 64, 5), 0.2 - 1e-3), torch.ones(500), torch.zeros(500), draws(500)
    )
    assert got.max() < MASK


def test_the_chain_passes_masks_down_through_the_blocks_until_none_is_left():
    ranges, shares = equal_shares(Uniform(), 3), []

    def denoise(block, noisy, level):
        shares.append((block, float((noisy == MASK).float().mean())))
        output = torch.full((*noisy.shape, 5), 0.2)
        return output, output

    start = NOISE.prior((50,), draws(400))
    assert start.dtype == torch.int64 and (start == MASK).all() and NOISE.centre(start) is start
    levels = schedule(ranges, Uniform(), 2)
    last = list(chain(denoise, NOISE, ranges, levels, start, draws=draws(400)))[-1]
    assert [block for block, _ in shares] == [0, 0, 1, 1, 2, 2]
    # the masked share is the level itself at every step: the draws of the steps are independent
    assert [share for _, share in shares] == pytest.approx(levels, abs=0.01)
    end = NOISE.step(last.noisy, last.denoised, torch.full((400,), last.level), torch.zeros(400), draws(400).fork(9))
    assert end.max() < MASK


def test_spread_draws_are_uniform_and_cover_evenly_and_depend_on_the_key():
    spread = draws(1000).spread(0)
    assert spread.min() > 0 and spread.max() < 1
    assert float((spread.sort().values - (torch.arange(1000) + 0.5) / 1000).abs().max()) < 0.005
    first = torch.stack([draws(1, key).spread(0)[0] for key in range(2000)]).sort().values
    assert torch.allclose(first, torch.linspace(0, 1, 2000), atol=0.05)
    # however a batch is cut
    assert torch.equal(Draws(torch.tensor(3), torch.arange(500, 1000)).spread(0), spread[500:])


def test_forked_draws_are_independent_of_each_other_and_of_their_origin():
    streams = torch.stack([d.uniform((50,), 1).flatten() for d in (draws(100), draws(100).fork(0), draws(100).fork(1))])
    assert float((torch.corrcoef(streams) - torch.eye(3)).abs().max()) < 0.05
