import math

import pytest
import torch

from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.parametrisation import EDM, PARAMETRISATIONS, Direct, FlowV, Tokens, Unseen, VpEps
from dbtrain.method.ranges import equal_shares

PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)
LEVELS = torch.tensor([0.002, 0.05, 0.5, 3.0, 80.0])


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sd", [0.125, 0.5, 1.0])
def test_preconditioning_is_table_1_of_edm(sd):
    z, f = values(0, 5, 3), values(1, 5, 3)
    s = LEVELS.double()[:, None]
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    own = EDM(sd)
    expected = c_skip * z.double() + c_out * f.double()
    assert torch.allclose(own.estimate(f, z, LEVELS).double(), expected, rtol=1e-5, atol=1e-6)
    expected = z.double() / (s**2 + sd**2).sqrt()
    assert torch.allclose(own.scale_input(z, LEVELS).double(), expected, rtol=1e-5)
    assert torch.allclose(own.time(LEVELS).double(), LEVELS.double().log() / 4, rtol=1e-6)


def test_signal_scaling_fades_pure_noise_out():
    z, s = values(0, 5, 3), LEVELS.double()[:, None]
    got = EDM(0.5, "signal").scale_input(z, LEVELS).double()
    assert torch.allclose(got, z.double() / (s**2 + 0.25), rtol=1e-5)
    assert got[-1].abs().max() < 1e-3


@pytest.mark.parametrize("sd", [0.125, 0.5, 1.0])
def test_identities_that_define_the_coefficients(sd):
    own, one, zero, s = EDM(sd), torch.ones(5), torch.zeros(5), LEVELS
    noise = GaussianNoise(PAPER, sd, "edm")
    c_skip, c_out = own.estimate(zero, one, s), own.estimate(one, zero, s)
    c_in = own.scale_input(one, s)
    # unit variance in, and an output F of unit variance fills what c_skip * z leaves of the target's variance
    assert torch.allclose(c_in**2 * (s**2 + sd**2), one, rtol=1e-5)
    assert torch.allclose(c_skip**2 * (s**2 + sd**2) + c_out**2, torch.full((5,), sd**2), rtol=1e-5)
    # EDM's weight makes the loss on F uniform over the levels
    assert torch.allclose(noise.weight(s) * c_out**2, one, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)], ids=str)
def test_combining_the_ideal_output_gives_the_clean_target(shape):
    y, s = values(0, *shape), LEVELS.reshape(-1, *[1] * (len(shape) - 1))
    z = y + s * values(1, *shape)
    ideal = (y - 0.25 / (s**2 + 0.25) * z) / (s * 0.5 / (s**2 + 0.25).sqrt())
    assert torch.allclose(EDM().estimate(ideal, z, LEVELS), y, atol=1e-4)


def clean_and_noisy(shape=(5, 3)):
    """x, eps, y = x + sigma eps, and sigma with as many dimensions; float64."""
    x, eps = values(0, *shape).double(), values(1, *shape).double()
    sigma = LEVELS.double().reshape(-1, *[1] * (len(shape) - 1))
    return x, eps, x + sigma * eps, sigma


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4, 4)], ids=str)
def test_the_velocity_of_a_flow_gives_the_clean_target(shape):
    x, eps, y, sigma = clean_and_noisy(shape)
    own, level, t = FlowV(), LEVELS.double(), sigma / (1 + sigma)
    assert torch.allclose(own.scale_input(y, level), (1 - t) * x + t * eps)
    assert torch.allclose(own.estimate(eps - x, y, level), x)
    # D = z - t F, with z in the flow's own scale
    guess = values(2, *shape).double()
    assert torch.allclose(own.estimate(guess, y, level), own.scale_input(y, level) - t * guess)


def test_the_time_of_a_flow_is_the_logistic_of_log_sigma():
    t = FlowV().time(LEVELS.double())
    assert torch.allclose(torch.logit(t), LEVELS.double().log())
    assert float(t.min()) > 0 and float(t.max()) < 1


def test_the_loss_of_the_velocity_is_that_of_the_estimate_times_its_weight():
    x, eps, y, sigma = clean_and_noisy()
    guess = values(2, 5, 3).double()
    velocity = (guess - (eps - x)) ** 2
    estimate = (FlowV().estimate(guess, y, LEVELS.double()) - x) ** 2
    assert torch.allclose(velocity, ((1 + sigma) / sigma) ** 2 * estimate)


def test_an_euler_step_in_t_is_one_in_sigma():
    x, _, y, sigma = clean_and_noisy()
    own, level, lower = FlowV(), LEVELS.double(), 0.3 * LEVELS.double()
    velocity = values(2, 5, 3).double()
    t, s = own.time(level)[:, None], own.time(lower)[:, None]
    in_t = own.scale_input(y, level) + (s - t) * velocity
    draws = Draws(torch.tensor(0), torch.arange(5))
    in_sigma = GaussianNoise(PAPER).step(y, own.estimate(velocity, y, level), level, lower, draws)
    assert torch.allclose(own.scale_input(in_sigma, lower), in_t)


@pytest.mark.parametrize(
    ("shift", "blocks", "edges"),
    [
        (1, 2, [0.500]),
        (1, 3, [0.394, 0.606]),
        (3, 2, [0.750]),
        (3, 3, [0.661, 0.822]),
        (5, 2, [0.833]),
        (5, 3, [0.765, 0.885]),
        (12, 2, [0.923]),
        (12, 3, [0.886, 0.949]),
    ],
)
def test_a_shifted_logit_normal_is_our_log_normal(shift, blocks, edges):
    """t' = k t/(1 + (k - 1) t) is sigma' = k sigma: p_mean = m + ln k, p_std = s."""
    wide = LogNormal(math.log(shift), 1.0, 1e-6, 1e6)
    falling = FlowV().time(torch.tensor(equal_shares(wide, blocks).edges[1:-1], dtype=torch.float64))
    assert falling.flip(0).tolist() == pytest.approx(edges, abs=5e-4)


def test_the_noise_of_a_variance_preserving_network_gives_the_clean_target():
    x, eps, y, sigma = clean_and_noisy()
    own, level = VpEps(), LEVELS.double()
    assert torch.allclose(own.estimate(eps, y, level), x)
    # alpha x + sqrt(1 - alpha^2) eps with alpha = 1/sqrt(1 + sigma^2)  # Song et al. 2021
    alpha = (1 + sigma**2) ** -0.5
    assert torch.allclose(own.scale_input(y, level), alpha * x + (1 - alpha**2).sqrt() * eps)


def test_the_time_of_a_variance_preserving_network_is_the_inverse_of_its_schedule():
    own, t = VpEps(), torch.tensor([1e-3, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    sigma = ((0.5 * 19.9 * t**2 + 0.1 * t).exp() - 1).sqrt()  # EDM, Table 1 (VP)
    assert torch.allclose(own.time(sigma), 999 * t)
    assert own.time(sigma.float()).dtype == torch.float32


def test_a_prediction_of_the_target_itself_stays_as_it_is():
    _, _, y, _ = clean_and_noisy()
    output = values(2, 5, 3).double()
    for own in (Direct(0.25), Tokens(), Unseen()):
        assert torch.equal(own.estimate(output, y, LEVELS), output)
    assert torch.equal(Direct(0.25).scale_input(y, LEVELS), EDM(0.25).scale_input(y, LEVELS))
    assert torch.equal(Direct(0.25).time(LEVELS), EDM(0.25).time(LEVELS))
    for own in (Tokens(), Unseen()):
        assert torch.equal(own.scale_input(y, LEVELS), y)
    assert torch.equal(Tokens().time(LEVELS), LEVELS) and not Unseen().time(LEVELS).any()


@pytest.mark.parametrize("name", [name for name in PARAMETRISATIONS if name != "tokens"])
def test_levels_of_positions_act_on_their_own_position(name):
    own, z, output = PARAMETRISATIONS[name](0.5, "unit"), values(0, 2, 5, 3), values(1, 2, 5, 3)
    whole = own.estimate(output, z, LEVELS.expand(2, 5)), own.scale_input(z, LEVELS.expand(2, 5))
    each = own.estimate(output[0], z[0], LEVELS), own.scale_input(z[0], LEVELS)
    assert all(torch.equal(w[0], e) for w, e in zip(whole, each, strict=True))


TABLES = {"vp_eps_linear": ("linear", 1e-4, 0.02), "vp_eps_scaled_linear": ("scaled_linear", 0.00085, 0.012)}


@pytest.mark.parametrize("name", TABLES)
def test_the_index_of_a_sigma_is_that_of_diffusers_in_the_same_table(name):
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    schedule, start, end = TABLES[name]
    theirs = schedulers.DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end)
    own, index = PARAMETRISATIONS[name](0.5, "unit"), torch.tensor([0, 1, 37, 500, 998, 999])
    kept = theirs.alphas_cumprod.double()[index]
    sigma = ((1 - kept) / kept).sqrt()
    # theirs is a table of float32
    assert torch.allclose(own.time(sigma), index.double(), atol=0.02)
    y, eps = values(0, 6, 3).double(), values(1, 6, 3).double()
    noisy = theirs.add_noise(y, eps, index)
    assert torch.allclose(own.scale_input(y + sigma[:, None] * eps, sigma), noisy, rtol=1e-4, atol=1e-5)
    assert torch.allclose(own.estimate(eps, y + sigma[:, None] * eps, sigma), y, atol=1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_between_two_indices_time_rises_and_beyond_the_table_it_stands_still(name):
    own = PARAMETRISATIONS[name](0.5, "unit")
    times = own.time(torch.logspace(-3, 3, 400, dtype=torch.float64))
    assert times[0] == 0 and times[-1] == 999 and (times.diff() >= 0).all()
    inside = (times > 0) & (times < 999)
    assert (times[inside].diff() > 0).all() and (times != times.round()).any()
    assert own.time(torch.tensor([1.0])).dtype == torch.float32


def test_the_channels_of_a_learned_variance_are_not_looked_at():
    own, z, level = VpEps(betas="linear"), values(0, 5, 4, 2, 2), LEVELS
    eps, variance = values(1, 5, 4, 2, 2), values(2, 5, 4, 2, 2)
    assert torch.equal(own.estimate(torch.cat([eps, variance], dim=1), z, level), own.estimate(eps, z, level))
