import pytest
import torch

from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import GaussianNoise, NoNoise
from dbtrain.method.interface import Example
from dbtrain.method.levels import LogNormal

PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)
LEVELS = torch.tensor([0.002, 0.05, 0.5, 3.0, 80.0])


def noise(sigma_data=0.5, **settings):
    return GaussianNoise(PAPER, sigma_data, **settings)


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(count=5, key=7):
    return Draws(torch.tensor(key), torch.arange(count))


def test_weights():
    s = torch.tensor([0.002, 0.5, 80.0])
    edm = noise(weighting="edm").weight(s)
    assert edm.tolist() == pytest.approx([250_004, 8.0, 4.00015625], rel=1e-6)
    assert noise().weight(s).tolist() == [1, 1, 1]
    assert noise(weighting="eps").weight(s).tolist() == pytest.approx([250_000, 4.0, 1 / 6400], rel=1e-6)
    assert noise(weighting="clamp").weight(s).tolist() == pytest.approx([5.0, 2.0, 1.0000390625], rel=1e-6)


def test_clamped_weights_tell_the_levels_of_codes_apart():
    codes = GaussianNoise(PAPER, 64**-0.5, "clamp")
    found = codes.weight(torch.tensor([0.01, 0.125, 0.25, 20.0])).tolist()
    assert found == pytest.approx([5.0, 2.0, 1.25, 1.0], rel=1e-4)


def test_a_perfect_denoiser_keeps_the_same_noise_at_the_lower_level():
    y, eps, s, lower = values(0, 5, 3), values(1, 5, 3), LEVELS, LEVELS * 0.3
    got = noise().step(y + s[:, None] * eps, y, s, lower, draws())
    assert torch.allclose(got, y + lower[:, None] * eps, rtol=1e-4, atol=1e-5)


def test_a_step_to_no_noise_lands_on_the_estimate():
    z, d = values(0, 5, 3), values(1, 5, 3)
    assert torch.equal(noise().step(z, d, LEVELS, torch.zeros(5), draws()), d)


def test_corruption_adds_noise_of_the_level_and_is_repeatable():
    y, level = torch.full((2, 20_000), 3.0), torch.tensor([0.5, 4.0])
    z = noise().corrupt(y, level, draws(2))
    assert z.mean(dim=1).tolist() == pytest.approx([3.0, 3.0], abs=0.1)
    assert z.std(dim=1).tolist() == pytest.approx([0.5, 4.0], rel=0.03)
    assert torch.equal(z, noise().corrupt(y, level, draws(2)))
    assert not torch.equal(z, noise().corrupt(y, level, draws(2, key=8)))


def test_prior_is_noise_of_the_greatest_level():
    start = noise().prior((20_000,), draws(2))
    assert start.shape == (2, 20_000)
    assert float(start.std()) == pytest.approx(80, rel=0.03)


def test_sampled_levels_follow_the_training_distribution():
    share = torch.linspace(0.01, 0.99, 99)
    level = noise().quantile(share)
    assert level.dtype == torch.float32
    assert torch.allclose(noise().cdf(level), share.double(), atol=1e-5)


def test_one_level_a_position():
    example = Example(clean=values(0, 2, 7, 3), context=torch.empty(2, 0), target=torch.zeros(2))
    per_position = noise(per_position=True)
    assert per_position.level_shape(example) == (7,) and noise().level_shape(example) == ()
    level = torch.tensor([[0.0] * 6 + [10.0]] * 2)
    moved = per_position.corrupt(example.clean, level, draws(2)) - example.clean
    assert (moved[:, :6] == 0).all() and (moved[:, 6] != 0).all()


def test_no_noise_shows_nothing_of_the_target():
    process, y, level = NoNoise(), values(0, 5, 3), torch.ones(5)
    assert (process.corrupt(y, level, draws()) == 0).all()
    assert (process.prior((3,), draws()) == 0).all() and process.prior((3,), draws()).shape == (5, 3)
    assert process.weight(level).tolist() == [1] * 5


def test_what_starts_from_noise_alone_knows_nothing_of_the_target():
    process, y = NoNoise(spread=2.0), values(0, 500, 40)
    noisy = process.corrupt(y, torch.ones(500), draws(500))
    assert torch.equal(noisy, process.prior((40,), draws(500)))
    assert float(noisy.std()) == pytest.approx(2, rel=0.02) and abs(float((noisy * y).mean())) < 0.05
    # and is evaluated from it too
    assert torch.equal(process.centre(noisy), noisy)
