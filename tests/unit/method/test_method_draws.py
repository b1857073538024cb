import math

import pytest
import torch

from dbtrain.method.draws import Draws, derive_seed

COUNT = 100_000
GOLDEN_SEED = 4294442165427462769


def draws(key=11, positions=None, count=64):
    return Draws(torch.tensor(key), torch.arange(count) if positions is None else positions)


def correlation(a, b):
    return abs(float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]))


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_the_same_arguments_give_the_same_bits(name):
    one, two = getattr(draws(), name)((3, 5), 1), getattr(draws(), name)((3, 5), 1)
    assert torch.equal(one, two) and one.dtype == torch.float32 and one.shape == (64, 3, 5)
    assert getattr(draws(), name)((), 0).shape == (64,)


def test_torchs_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    one, state = draws().normal((9,), 1), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(one, draws().normal((9,), 1))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sizes", [[64], [32, 32], [1, 5, 58], [1] * 64], ids=str)
def test_a_sample_keeps_its_noise_however_the_batch_is_cut(sizes):
    whole = draws().normal((4, 6), 1)
    cuts = torch.arange(64).split(sizes)
    assert torch.equal(torch.cat([draws(positions=cut).normal((4, 6), 1) for cut in cuts]), whole)
    backwards = torch.arange(63, -1, -1)
    assert torch.equal(draws(positions=backwards).normal((4, 6), 1).flip(0), whole)


def test_streams_keys_positions_and_elements_all_differ():
    pools = [draws(key).uniform((32,), stream) for key in (0, 1, derive_seed(0, 1)) for stream in (0, 1)]
    together = torch.cat([pool.flatten() for pool in pools])
    # 192 rows of 32 out of 2^23 values: some 2 values collide by chance, a repeated row or stream would be 32 at once
    assert len(together) - len(together.unique()) < 25
    for i, one in enumerate(pools):
        assert not any(torch.equal(one, other) for other in pools[:i])


def test_normals_are_standard_normal():
    z = draws(count=COUNT).normal((), 1).double()
    assert abs(float(z.mean())) < 5 / math.sqrt(COUNT)
    assert float(z.std()) == pytest.approx(1, abs=0.012)
    assert float((z**3).mean()) == pytest.approx(0, abs=0.05) and float((z**4).mean()) == pytest.approx(3, abs=0.15)
    assert kolmogorov(torch.special.ndtr(z)) < 1.95 / math.sqrt(COUNT)  # 0.1 % level


@pytest.mark.parametrize(
    ("key", "position", "element"), [(0, 5991, 34), (0, 11804, 873), (1, 3694, 11), (2, 7618, 394)]
)
def test_the_largest_draw_is_below_1_and_its_normal_is_finite(key, position, element):
    # at these places the 24 highest bits are all ones: rounded to float32 they once gave 1, and infinite noise
    one = draws(key, torch.tensor([position]))
    assert 0.9999 < float(one.uniform((1024,), 0)[0, element]) < 1
    assert 5 < float(one.normal((1024,), 0)[0, element]) < 6


@pytest.mark.parametrize("by", ["position", "element", "key"])
def test_uniforms_are_uniform_along_every_coordinate(by):
    if by == "position":
        u = draws(count=COUNT).uniform((), 0)
    elif by == "element":
        u = draws(count=1).uniform((COUNT,), 0)[0]
    else:
        u = torch.cat([draws(key=derive_seed(0, "noise", 1, step), count=10).uniform((), 0) for step in range(5000)])
    assert kolmogorov(u.double()) < 1.95 / math.sqrt(len(u))


def kolmogorov(u):
    ordered, count = u.sort().values, len(u)
    ranks = torch.arange(count, dtype=torch.float64)
    return float(torch.maximum((ranks + 1) / count - ordered, ordered - ranks / count).max())


def test_neighbours_are_not_correlated():
    bound = 5 / math.sqrt(COUNT)
    z = draws(count=COUNT).normal((2,), 1)
    assert correlation(z[:-1, 0], z[1:, 0]) < bound
    assert correlation(z[:, 0], z[:, 1]) < bound
    assert correlation(z[:, 0], draws(count=COUNT).normal((2,), 0)[:, 0]) < bound
    assert correlation(z[:, 0], draws(12, count=COUNT).normal((2,), 1)[:, 0]) < bound
    # the level and the noise of a sample are drawn from streams 0 and 1
    assert correlation(z[:, 0], draws(count=COUNT).uniform((), 0)) < bound


def test_seeds_are_functions_of_their_parts_that_fit_a_torch_seed():
    seeds = [derive_seed(0, "noise", block, step) for block in range(8) for step in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "noise", 3, 7) == derive_seed(0, "noise", 3, 7) != derive_seed(1, "noise", 3, 7)
    # stored runs must continue with the seeds they began with, on any version
    assert derive_seed(0, "noise", 1, 2) == GOLDEN_SEED
