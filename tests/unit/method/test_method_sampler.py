import math

import pytest
import torch

from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal, LogUniform
from dbtrain.method.ranges import Ranges, equal_shares
from dbtrain.method.sampler import chain, karras_schedule, schedule

PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)
THREE = equal_shares(PAPER, 3)
ONE = Ranges((10.0, 0.01))
NOISE = GaussianNoise(LogUniform(0.01, 10.0), 1.0)


def linear(block, noisy, level):
    """The exact denoiser of data ~ N(0, 1), whose ODE has the solution z ~ sqrt(sigma^2 + 1)."""
    denoised = noisy / (level[:, None] ** 2 + 1)
    return denoised, denoised


def end_error(steps, solver):
    levels = karras_schedule(0.01, 10.0, steps)
    start = torch.tensor([[3.0], [-7.0]], dtype=torch.float64)
    last = list(chain(linear, NOISE, ONE, levels, start, solver))[-1].denoised * (0.01**2 + 1)
    exact = start * math.sqrt((0.01**2 + 1) / (10.0**2 + 1))
    return float((last - exact).abs().max())


def test_heun_is_of_second_order_and_euler_of_first():
    euler, heun = ([end_error(steps, solver) for steps in (20, 40, 80)] for solver in ("euler", "heun"))
    assert all(h < e / 5 for e, h in zip(euler, heun, strict=True))
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.4) and euler[1] / euler[2] == pytest.approx(2, abs=0.3)
    assert heun[0] / heun[1] == pytest.approx(4, abs=0.8) and heun[1] / heun[2] == pytest.approx(4, abs=0.8)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_denoiser_that_knows_the_target_stays_on_the_straight_line(solver):
    y, eps = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.3, 0.7]])
    seen = []

    def knows(block, noisy, level):
        seen.append((float(level[0]), noisy))
        return y, y

    list(chain(knows, NOISE, ONE, karras_schedule(0.01, 10.0, 7), y + 10 * eps, solver))
    for level, noisy in seen:
        assert torch.allclose(noisy, y + level * eps, atol=1e-5)


@pytest.mark.parametrize("distribution", [PAPER, None], ids=["equal shares", "geometric"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_chain_hands_each_level_to_its_owner_from_the_noisiest_down(distribution, steps):
    levels = schedule(THREE, distribution, steps)
    asked = []

    def denoise(block, noisy, level):
        asked.append((block, float(level[0])))
        return noisy, noisy

    evaluations = list(chain(denoise, NOISE, THREE, levels, torch.zeros(2, 3)))
    assert [e.block for e in evaluations] == [b for b in range(3) for _ in range(steps)] == [b for b, _ in asked]
    assert [e.level for e in evaluations] == levels
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
    assert [e.level for e in evaluations[::steps]] == list(THREE.edges[:-1])
    assert [level for _, level in asked] == pytest.approx(levels)


def test_the_chain_passes_the_shrinking_noise_on_to_the_next_block():
    received = []

    def denoise(block, noisy, level):
        received.append(noisy)
        return torch.full_like(noisy, block), torch.full_like(noisy, float(block))

    ranges = Ranges((8.0, 4.0, 1.0, 0.5))
    evaluations = list(chain(denoise, NOISE, ranges, schedule(ranges, None, 1), torch.full((1, 1), 8.0)))
    # z' = (s'/s) z + (1 - s'/s) D with D = 0, then 1
    assert [float(z) for z in received] == pytest.approx([8.0, 4.0, 0.25 * 4 + 0.75 * 1])
    assert [float(e.denoised) for e in evaluations] == [0.0, 1.0, 2.0]


def test_heun_asks_the_owner_of_the_end_of_the_step_for_its_correction():
    asked = []

    def denoise(block, noisy, level):
        asked.append((block, round(float(level[0]), 3)))
        return noisy, noisy

    ranges = Ranges((8.0, 4.0, 1.0))
    list(chain(denoise, NOISE, ranges, [8.0, 4.0], torch.zeros(1, 1), "heun"))
    assert asked == [(0, 8.0), (1, 4.0), (1, 4.0)]


def test_steps_within_a_slice_are_equal_shares_of_the_distribution():
    levels = torch.tensor([*schedule(THREE, PAPER, 4), 0.002], dtype=torch.float64)
    assert torch.allclose(-PAPER.cdf(levels).diff(), torch.full((12,), 1 / 12, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("steps", [2, 18])
def test_karras_schedule_falls_from_the_high_end_to_the_low_one(steps):
    levels = karras_schedule(0.002, 80.0, steps)
    assert len(levels) == steps
    assert (levels[0], levels[-1]) == (pytest.approx(80.0, rel=1e-12), pytest.approx(0.002, rel=1e-9))
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))


def test_karras_schedule_is_equation_5_of_edm():
    third = (80 ** (1 / 7) + 2 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert karras_schedule(0.002, 80.0, 18)[2] == pytest.approx(third)
