import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws, derive_seed
from dbtrain.method.flow import FlowNoise, LogitNormal, ShiftedUniform, shifted
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import FlowV, Velocity
from dbtrain.method.ranges import Ranges, equal_shares, explicit
from dbtrain.method.sampler import chain, spaced_levels
from dbtrain.models.dit import DiT
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data
from tests.conftest import ROOT

LEVELS = torch.tensor([1e-4, 0.03, 0.5, 0.9, 0.9999], dtype=torch.float64)
SHIFTS = (0.3, 1.0, 3.0, 12.0)
DENSITIES = {
    "logit_normal": lambda shift: LogitNormal(0.0, 1.0, shift),
    "moved": lambda shift: LogitNormal(-0.5, 1.7, shift),
    "uniform": ShiftedUniform,
}

shifts = st.floats(0.05, 20)
flows = st.builds(
    lambda mean, std, shift: FlowNoise(LogitNormal(mean, std, shift), shift),
    st.floats(-2, 2), st.floats(0.3, 2), shifts,
)  # fmt: skip


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy_pairs():
    """Clean, noise, and both processes' noisy target at the same level, t and sigma = t/(1 - t)."""
    x, eps, t = values(0, 5, 3), values(1, 5, 3), LEVELS[:, None]
    return x, eps, (1 - t) * x + t * eps, x + t / (1 - t) * eps, LEVELS / (1 - LEVELS)


def test_corruption_is_linear_in_t_from_the_target_to_the_noise():
    noise, draws = FlowNoise(LogitNormal(0.0, 1.0, 1.0)), Draws(torch.tensor(3), torch.arange(4))
    clean = values(0, 4, 2, 3).float()
    ends = [noise.corrupt(clean, torch.full((4,), t), draws) for t in (0.0, 0.25, 1.0)]
    assert torch.equal(ends[0], clean) and torch.equal(ends[2], noise.prior((2, 3), draws))
    assert torch.allclose(ends[1], 0.75 * ends[0] + 0.25 * ends[2])


def test_it_is_gaussian_noise_in_another_scale_and_the_same_network():
    x, eps, z, y, sigma = noisy_pairs()
    own, same, output = Velocity(), FlowV(), values(2, 5, 3)
    assert torch.allclose(z, y / (1 + sigma[:, None]))
    assert torch.allclose(own.scale_input(z, LEVELS), same.scale_input(y, sigma))
    assert torch.allclose(own.time(LEVELS), same.time(sigma))
    assert torch.allclose(own.estimate(output, z, LEVELS), same.estimate(output, y, sigma))
    assert torch.allclose(own.estimate(eps - x, z, LEVELS), x)


def test_the_weighted_loss_of_the_estimate_is_the_plain_one_of_the_velocity():
    x, eps, z, _, sigma = noisy_pairs()
    guess, noise = values(2, 5, 3), FlowNoise(ShiftedUniform(1.0))
    estimate = (Velocity().estimate(guess, z, LEVELS) - x) ** 2
    assert torch.allclose(noise.weight(LEVELS)[:, None] * estimate, (guess - (eps - x)) ** 2, rtol=1e-6)
    assert torch.allclose(noise.weight(LEVELS), ((1 + sigma) / sigma) ** 2)
    assert torch.equal(FlowNoise(ShiftedUniform(1.0), velocity=False).weight(LEVELS), torch.ones_like(LEVELS))


def test_an_euler_step_is_that_of_the_velocity_and_one_in_sigma():
    x, _, z, y, sigma = noisy_pairs()
    t, lower, velocity = LEVELS, 0.4 * LEVELS, values(2, 5, 3)
    denoised, draws = Velocity().estimate(velocity, z, t), Draws(torch.tensor(0), torch.arange(5))
    stepped = FlowNoise(ShiftedUniform(1.0)).step(z, denoised, t, lower, draws)
    assert torch.allclose(stepped, z + (lower - t)[:, None] * velocity)
    below = lower / (1 - lower)
    in_sigma = GaussianNoise(LogNormal(-1.2, 1.2, 0.002, 80.0)).step(y, denoised, sigma, below, draws)
    assert torch.allclose(stepped, in_sigma / (1 + below[:, None]))


@given(shifts, st.floats(1e-6, 1 - 1e-6))
def test_a_shift_multiplies_sigma_and_its_inverse_takes_it_back(shift, t):
    level = torch.tensor(t, dtype=torch.float64)
    moved = shifted(level, shift)
    assert float(moved / (1 - moved)) == pytest.approx(shift * t / (1 - t))
    assert float(shifted(moved, 1 / shift)) == pytest.approx(t)


@given(st.floats(-2, 2), st.floats(0.3, 2), shifts)
def test_a_shifted_logit_normal_is_the_log_normal_of_sigma(mean, std, shift):
    t = LEVELS
    normal = LogNormal(mean + math.log(shift), std, 1e-12, 1e12)
    assert torch.allclose(LogitNormal(mean, std, shift).cdf(t), normal.cdf(t / (1 - t)), atol=1e-6)


@given(shifts, st.floats(0, 1))
def test_quantile_is_the_inverse_of_the_distribution_function(shift, share):
    q = torch.tensor(share, dtype=torch.float64)
    for density in DENSITIES.values():
        distribution = density(shift)
        assert float(distribution.cdf(distribution.quantile(q))) == pytest.approx(share, abs=1e-9)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert distribution.cdf(ends).tolist() == distribution.quantile(ends).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("shift", "edges"),
    [(1, [0.606, 0.394]), (3, [0.822, 0.661]), (5, [0.885, 0.765]), (12, [0.949, 0.886])],
)
def test_edges_of_equal_probability_lie_after_the_shift(shift, edges):
    found = FlowNoise(LogitNormal(0.0, 1.0, shift), shift).split(3).edges
    assert found[0] == 1.0 and found[-1] == 0.0 and found[1:-1] == pytest.approx(edges, abs=5e-4)
    assert FlowNoise(ShiftedUniform(shift), shift).split(2).edges[1] == pytest.approx(shift / (1 + shift))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_million_draws_fall_into_each_block_by_its_share(density, shift):
    noise, count = FlowNoise(DENSITIES[density](shift), shift), 1_000_000
    levels = noise.quantile(Draws(torch.tensor(7), torch.arange(count)).uniform((), 0))
    assert float(levels.min()) > 0 and float(levels.max()) <= 1
    for ranges in (noise.split(3), Ranges((1.0, 0.875, 0.2, 0.0))):
        shares = -noise.cdf(torch.tensor(ranges.edges, dtype=torch.float64)).diff()
        found = ranges.block_of(levels).bincount(minlength=3).double() / count
        # five standard deviations of a share
        assert ((found - shares).abs() <= 5 * (shares * (1 - shares) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("density", DENSITIES)
def test_a_block_trains_on_its_slice_by_the_density_within_it(density):
    noise = FlowNoise(DENSITIES[density](3.0), 3.0)
    ranges, seen = noise.split(2), []
    model = DiT(noise=noise, parametrisation=Velocity(), image=(1, 4, 4), classes=2, depth=2, dim=16, heads=2)
    model.stem.level.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    batch = {"image": torch.zeros(20_000, 1, 4, 4), "label": torch.zeros(20_000, dtype=torch.int64)}
    for block in range(2):
        objective = BlockObjective(model, [block], *ranges.of(block), "fp32")
        with torch.no_grad():
            assert objective(batch, torch.tensor(block), torch.arange(20_000)).isfinite()
        assert (ranges.block_of(seen[block]) == block).all()
        inside = noise.cdf(seen[block]) * 2 - (1 - block)
        assert float(inside.mean()) == pytest.approx(0.5, abs=0.01)


@given(flows, st.integers(1, 6), st.integers(1, 60), st.floats(0.01, 0.99))
def test_a_level_has_one_owner_in_training_evaluation_and_sampling(noise, blocks, steps, between):
    """At each edge and beside it, and at every level of a solver: decided in float64, before any cast."""
    ranges = noise.split(blocks)
    again = Ranges.from_hex([edge.hex() for edge in ranges.edges])
    beside = [math.nextafter(edge, end) for edge in ranges.edges[1:-1] for end in (0, 1)]
    levels = [*ranges.edges[:-1], *beside, *noise.whole_schedule(ranges, steps), *noise.schedule(ranges, 3), between]
    levels = sorted(levels, reverse=True)
    trained = [next(b for b in range(blocks) if ranges.of(b)[0] < t <= ranges.of(b)[1]) for t in levels]
    asked: list[int] = []

    def denoise(block, noisy, level):
        asked.append(block)
        return noisy, noisy

    sampled = [e.block for e in chain(denoise, noise, again, levels, torch.zeros(1, 2))]
    evaluated = again.block_of(torch.tensor(levels, dtype=torch.float64)).tolist()
    assert trained == sampled == asked == evaluated


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_solver_that_knows_the_target_ends_there(shift, solver):
    noise = FlowNoise(LogitNormal(0.0, 1.0, shift), shift)
    ranges, x = noise.split(3), values(0, 4, 2).float()
    start = noise.prior((2,), Draws(torch.tensor(1), torch.arange(4)))
    levels = spaced_levels(noise, ranges, 12, "karras")
    assert levels[0] == 1.0 and levels[-1] > 0 and list(levels) == sorted(levels, reverse=True)
    evaluations = list(chain(lambda block, z, t: (x, x), noise, ranges, levels, start, solver))
    # on the straight line from the noise to the target all the way
    for e in evaluations:
        assert torch.allclose(e.noisy, (1 - e.level) * x + e.level * start, atol=1e-5)
    assert torch.equal(evaluations[-1].denoised, x)


def test_steps_are_equal_before_the_shift():
    noise = FlowNoise(ShiftedUniform(3.0), 3.0)
    assert noise.whole_schedule(noise.split(2), 4) == pytest.approx([1.0, 0.9, 0.75, 0.5])


DIT = {
    "name": "run", "blocks": 2, "model": {"arch": "dit", "depth": 2, "dim": 16, "heads": 2},
    "data": {"source": "digits"}, "noise": {"process": "flow"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["noise.ranges=paper"], "noise.ranges=paper is not for noise.process=flow: set logit_normal"),
        (["noise.weighting=edm"], "noise.weighting=edm is for Gaussian noise"),
        (["noise.sigma_data=0.5"], "noise.sigma_data=0.5 is for Gaussian noise"),
        (["noise.input_scaling=signal"], "noise.input_scaling=signal is for Gaussian noise"),
        (["noise.ranges=explicit", "noise.edges=[0.9,0.5,0]"], "must fall from 1 to 0"),
        (["noise.ranges=explicit", "noise.edges=[1,1.5,0]"], "do not tile"),
        (["noise.ranges=explicit", "noise.edges=[1,0]"], "2 values; blocks=2 needs 3"),
        (["noise.shift=0"], "noise.shift=0: .*greater than 0"),
        (
            ["noise.process=gaussian", "noise.shift=3"],
            "noise.shift=3.0 is for noise.process=flow, and this is gaussian",
        ),
    ],
    ids=str,
)
def test_settings_that_are_not_for_a_flow_are_refused(overrides, message, digits):
    with pytest.raises(ConfigError, match=message):
        design(load_config(None, overrides, base=DIT), digits, None)


def test_a_plan_of_a_flow_is_read_back_as_it_was(digits):
    given = load_config(None, ["noise.shift=3", "noise.logit_mean=0.2", "noise.overlap=0"], base=DIT)
    run_plan = design(given, digits, None)
    assert run_plan.distribution == {"kind": "logit_normal", "logit_mean": 0.2, "logit_std": 1.0, "shift": 3.0}
    assert run_plan.ranges == equal_shares(LogitNormal(0.2, 1.0, 3.0), 2)
    assert isinstance(run_plan.parametrisation(), Velocity) and run_plan.noise().velocity
    experts = load_config(None, ["noise.ranges=explicit", "noise.edges=[1,0.875,0]"], base=DIT)
    assert design(experts, digits, None).ranges == explicit((1, 0.875, 0), 2)


@pytest.mark.parametrize(
    ("arch", "data", "velocity"),
    [
        ({"arch": "vit", "depth": 2, "dim": 16, "heads": 2, "patch": 4}, {"source": "digits"}, False),
        ({"arch": "dit", "depth": 2, "dim": 16, "heads": 2}, {"source": "digits"}, True),
        ({"arch": "ar_lm", "depth": 2, "dim": 16, "heads": 2}, {"source": "text"}, False),
    ],
    ids=lambda value: value["arch"] if isinstance(value, dict) and "arch" in value else "",
)
def test_every_architecture_of_vectors_learns_under_it(arch, data, velocity, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the rat. " * 200)
    if data["source"] == "text":
        data = {**data, "path": str(tmp_path / "text.txt"), "length": 16, "cache": str(tmp_path)}
    base = {**DIT, "model": arch, "data": data, "codebook": {"dim": 32}, "training": {"batch_size": 32}}
    given = load_config(None, base=base)
    data_set = load_data(given)
    run_plan = design(given, data_set, None)
    assert run_plan.noise().velocity is velocity
    objective, losses = run_plan.objective(1), []
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batch = data_set.train.batch(torch.arange(32), torch.device("cpu"))
    for step in range(60):
        loss = objective(batch, torch.tensor(derive_seed(0, step)), torch.arange(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_runs_of_other_processes_keep_their_hash():
    plain = load_config(None, base={**DIT, "noise": {}})
    assert not {"shift", "logit_mean", "logit_std", "process"} & set(plain.content()["noise"])
    flow = load_config(None, base=DIT)
    assert flow.content()["noise"]["shift"] == 1.0
    assert flow.content_hash() != load_config(None, ["noise.shift=3"], base=DIT).content_hash()


def test_a_plan_prints_t_sigma_draws_and_solver_steps_of_each_slice(tmp_path):
    settings = [f"out={tmp_path}", "name=run", "blocks=2", "noise.process=flow", "noise.shift=3", "evaluation.steps=24"]
    done = CliRunner().invoke(app, ["plan", str(ROOT / "configs/dit_digits.yaml"), *settings])
    assert done.exit_code == 0, done.output
    # 12 equal steps before the shift start at 1/2 or above it but for the last, which is the edge 0.75 after it
    assert "slice 0: t 0.75-1, sigma 3-inf, 50 % of the draws, 12 of 24 solver steps" in done.output
    assert "slice 1: t 0-0.75, sigma 0-3, 50 % of the draws, 12 of 24 solver steps" in done.output
