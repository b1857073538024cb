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


@pytest.mark.parametrize("sd", [0.125, 0.5, 1.0])
def test_preconditioning_is_table_1_of_edm(sd):
    z, f = values(0, 5, 3), values(1, 5, 3)
    s = LEVELS.double()[:, None]
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    process = noise(sd)
    expected = c_skip * z.double() + c_out * f.double()
    assert torch.allclose(process.combine(f, z, LEVELS).double(), expected, rtol=1e-5, atol=1e-6)
    expected = z.double() / (s**2 + sd**2).sqrt()
    assert torch.allclose(process.scale_input(z, LEVELS).double(), expected, rtol=1e-5)
    assert torch.allclose(process.embed_level(LEVELS).double(), LEVELS.double().log() / 4, rtol=1e-6)


def test_signal_scaling_fades_pure_noise_out():
    z, s = values(0, 5, 3), LEVELS.double()[:, None]
    got = noise(input_scaling="signal").scale_input(z, LEVELS).double()
    assert torch.allclose(got, z.double() / (s**2 + 0.25), rtol=1e-5)
    assert got[-1].abs().max() < 1e-3


@pytest.mark.parametrize("sd", [0.125, 0.5, 1.0])
def test_identities_that_define_the_coefficients(sd):
    process, one, zero, s = noise(sd, weighting="edm"), torch.ones(5), torch.zeros(5), LEVELS
    c_skip, c_out = process.combine(zero, one, s), process.combine(one, zero, s)
    c_in = process.scale_input(one, s)
    # unit variance in, and an output F of unit variance fills what c_skip * z leaves of the target's variance
    assert torch.allclose(c_in**2 * (s**2 + sd**2), one, rtol=1e-5)
    assert torch.allclose(c_skip**2 * (s**2 + sd**2) + c_out**2, torch.full((5,), sd**2), rtol=1e-5)
    # EDM's weight makes the loss on F uniform over the levels
    assert torch.allclose(process.weight(s) * c_out**2, one, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)], ids=str)
def test_combining_the_ideal_output_gives_the_clean_target(shape):
    y, s = values(0, *shape), LEVELS.reshape(-1, *[1] * (len(shape) - 1))
    z = y + s * values(1, *shape)
    ideal = (y - 0.25 / (s**2 + 0.25) * z) / (s * 0.5 / (s**2 + 0.25).sqrt())
    assert torch.allclose(noise().combine(ideal, z, LEVELS), y, atol=1e-4)


def test_weights():
    s = torch.tensor([0.002, 0.5, 80.0])
    edm = noise(weighting="edm").weight(s)
    assert edm.tolist() == pytest.approx([250_004, 8.0, 4.00015625], rel=1e-6)
    assert noise().weight(s).tolist() == [1, 1, 1]
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
    assert torch.equal(process.combine(y, torch.zeros(5, 3), level), y)
    assert process.weight(level).tolist() == [1] * 5


def test_what_starts_from_noise_alone_knows_nothing_of_the_target():
    process, y = NoNoise(spread=2.0), values(0, 500, 40)
    noisy = process.corrupt(y, torch.ones(500), draws(500))
    assert torch.equal(noisy, process.prior((40,), draws(500)))
    assert float(noisy.std()) == pytest.approx(2, rel=0.02) and abs(float((noisy * y).mean())) < 0.05
    # and is evaluated from it too
    assert torch.equal(process.centre(noisy), noisy)
