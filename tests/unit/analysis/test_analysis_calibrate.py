import math

import pytest
import torch

from dbtrain.analysis import calibrate as room
from dbtrain.analysis.calibrate import calibrate, decided, entropy, level_at, temperature
from dbtrain.config import load_config
from dbtrain.coordinator.design import design
from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook
from dbtrain.method.levels import read_distribution
from dbtrain.training.blueprint import load_data

LEVELS = torch.logspace(-3, 4, 60, dtype=torch.float64)
CODES = make_codebook("orthogonal", 10, 32, seed=0).double()


def open_questions(count=1500, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    return (spread * torch.randn(count, 10, generator=generator, dtype=torch.float64)).softmax(dim=-1)


def test_noise_decides_nothing_at_great_levels_and_everything_at_small_ones():
    shares = decided(open_questions(), CODES, LEVELS, seed=3)
    assert shares[0] == pytest.approx(1, abs=1e-9) and shares[-1] == pytest.approx(0, abs=1e-4)
    assert (shares.diff() < 2e-3).all()
    assert torch.equal(shares, decided(open_questions(), CODES, LEVELS, seed=3))


def test_between_two_codes_it_is_the_capacity_of_the_binary_gaussian_channel():
    codes, levels = (
        torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)),
        torch.tensor([0.3, 0.7, 1.5, 4.0], dtype=torch.float64),
    )
    got = decided(torch.full((20_000, 2), 0.5, dtype=torch.float64), codes, levels, seed=1)
    # the log odds of the right code are normal with mean d^2/(2 s^2) and twice that variance; d^2 = 5 here
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for level, share in zip(levels.tolist(), got.tolist(), strict=True):
        odds = 2.5 / level**2 + z * math.sqrt(5) / level
        p = torch.sigmoid(odds)
        left = torch.trapezoid(density * entropy(torch.stack([p, 1 - p], dim=-1)), z)
        assert share == pytest.approx(1 - float(left) / math.log(2), abs=0.015)


def test_the_share_does_not_depend_on_where_the_codes_point():
    probabilities = open_questions()
    turned = make_codebook("orthogonal", 10, 32, seed=9).double()
    levels = LEVELS[10:50]
    one, two = decided(probabilities, CODES, levels, 0), decided(probabilities, turned, levels, 0)
    assert torch.allclose(one, two, atol=0.05)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_the_level_of_a_share_inverts_the_curve(share):
    levels = torch.logspace(-2, 2, 80, dtype=torch.float64)
    curve = 1 / (1 + levels**2)
    level = level_at(levels, curve, share)
    assert 1 / (1 + level**2) == pytest.approx(share, rel=0.02)
    assert level_at(levels, curve, float(curve[40])) == pytest.approx(float(levels[40]))


def test_a_curve_that_never_reaches_the_share_is_refused():
    levels = torch.logspace(-2, 2, 80, dtype=torch.float64)
    for curve in (torch.zeros(80), torch.ones(80), torch.full((80,), math.nan)):
        with pytest.raises(ConfigError, match="noise.ranges=uniform"):
            level_at(levels, curve.double(), 0.05)


def test_temperature_undoes_over_confidence():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 10, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    assert temperature(logits, target) == pytest.approx(1, rel=0.1)
    assert temperature(3 * logits, target) == pytest.approx(3, rel=0.1)
    assert temperature(logits / 3, target) == pytest.approx(1 / 3, rel=0.1)


def test_entropy_in_nats():
    rows = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    assert entropy(rows).tolist() == pytest.approx([math.log(2), 0.0])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(room, "PILOT_STEPS", 30)
    base = {
        "name": "toy",
        "model": {"arch": "vit", "depth": 2, "dim": 16, "heads": 2, "patch": 4},
        "data": {"source": "digits"},
        "codebook": {"dim": 16},
        "blocks": 2,
    }
    return lambda *overrides: load_config(None, overrides, base=base)


def test_calibration_is_a_function_of_configuration_and_data(toy):
    config, data = toy(), load_data(toy())
    codes = make_codebook("orthogonal", 10, 16, 0)
    torch.manual_seed(1)
    first, state = calibrate(config, data, codes), torch.get_rng_state()
    torch.manual_seed(2)
    assert first == calibrate(config, data, codes)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert first["kind"] == "loguniform" and 0.05 < first["sigma_min"] < first["sigma_max"] < 100
    curve = first["calibration"]
    assert 0 < curve["left_open_nats"] <= math.log(10)
    levels, shares = (torch.tensor(curve[key], dtype=torch.float64) for key in ("levels", "decided"))
    at = torch.searchsorted(levels, torch.tensor([first["sigma_min"], first["sigma_max"]], dtype=torch.float64))
    assert shares[at[0]] <= 0.05 <= shares[at[0] - 1] and shares[at[1]] <= 0.001 <= shares[at[1] - 1]


def test_the_pilot_is_calibrated_on_what_was_held_out(toy, monkeypatch):
    monkeypatch.setattr(room, "PILOT_LR", 1e-2)  # so that few steps teach it something
    monkeypatch.setattr(room, "PILOT_STEPS", 80)
    data = load_data(toy())
    probabilities = room.pilot(toy(), data, make_codebook("orthogonal", 10, 16, 0))
    labels = data.validation.batch(torch.arange(len(data.validation)), torch.device("cpu"))["label"]
    assert probabilities.shape == (144, 10) and probabilities.dtype == torch.float64
    assert temperature(probabilities.log(), labels) == pytest.approx(1, rel=0.03)


def test_equal_information_splits_what_is_decided_equally(toy):
    config = toy("noise.ranges=equal_information")
    blueprint = design(config, load_data(config), calibrate)
    distribution = read_distribution(blueprint.distribution)
    curve = blueprint.distribution["calibration"]
    levels, shares = (torch.tensor(curve[key], dtype=torch.float64) for key in ("levels", "decided"))
    middle = math.log(blueprint.ranges.edges[1])
    at = int(torch.searchsorted(levels.log(), middle))
    # half of the information lies above the boundary
    assert float(shares[at]) <= 0.5 + 0.01 and float(shares[at - 1]) >= 0.5 - 0.01
    assert (distribution.low, distribution.high) == (blueprint.ranges.edges[-1], blueprint.ranges.edges[0])
