import json
import math

import pytest
import torch

from dbtrain.config import load_config
from dbtrain.data.splits import DataSet
from dbtrain.method.codebook import make_codebook
from dbtrain.method.levels import read_distribution
from dbtrain.run import pilot as pilot_room
from dbtrain.run.calibrate import (
    GREATEST_SHARE,
    LEAST_SHARE,
    calibrate,
    described,
    even_contexts,
    measure,
)
from dbtrain.run.information import decided, entropy, gained, levels_at
from dbtrain.run.make_plan import design
from dbtrain.run.pilot import Answers, ask_pilots, folded, temperature
from dbtrain.run.plan import load_data

LEVELS = torch.logspace(-3, 4, 90, dtype=torch.float64)
GRID = torch.logspace(math.log10(0.05), 2, 77, dtype=torch.float64)
ENDS = torch.tensor([GREATEST_SHARE, LEAST_SHARE], dtype=torch.float64)
CODES = make_codebook("orthogonal", 10, 32, seed=0).double()


def open_questions(count=1500, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, 10, generator=generator, dtype=torch.float64)).softmax(dim=-1)


def shares(probabilities, codes, levels, seed):
    return decided(gained(probabilities, codes, levels, seed))


def ends(probabilities, seed=0, codes=CODES):
    return levels_at(GRID, shares(probabilities, codes, GRID, seed), ENDS)


def test_noise_decides_nothing_at_great_levels_and_everything_at_small_ones():
    curve = shares(open_questions(), CODES, LEVELS, 3)
    assert curve[0] == 1 and curve[-1] == pytest.approx(0, abs=1e-6) and (curve.diff() <= 0).all()
    assert torch.equal(curve, shares(open_questions(), CODES, LEVELS, 3))


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_what_a_clean_code_tells_is_all_that_the_context_leaves_open(spread):
    probabilities = open_questions(spread=spread)
    told = gained(probabilities, CODES, LEVELS, 3)[:, 0].mean()
    assert float(told) == pytest.approx(float(entropy(probabilities).mean()), rel=0.03)


def test_between_two_codes_it_is_the_capacity_of_the_binary_gaussian_channel():
    codes = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    levels = torch.logspace(-2, 2, 161, dtype=torch.float64)
    got = gained(torch.full((2_000, 2), 0.5, dtype=torch.float64), codes, levels, seed=1).mean(dim=0)
    # the log odds of the right code are normal with mean d^2/(2 s^2) and twice that variance; d^2 = 5 here
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for level, found in list(zip(levels.tolist(), got.tolist(), strict=True))[40::10]:
        p = torch.sigmoid(2.5 / level**2 + z * math.sqrt(5) / level)
        left = torch.trapezoid(density * entropy(torch.stack([p, 1 - p], dim=-1)), z)
        # relative, also where the code tells a ten-thousandth of a nat
        assert found == pytest.approx(math.log(2) - float(left), rel=0.02)


def test_the_share_does_not_depend_on_where_the_codes_point():
    probabilities = open_questions()
    turned = make_codebook("orthogonal", 10, 32, seed=9).double()
    one, two = shares(probabilities, CODES, GRID, 0), shares(probabilities, turned, GRID, 0)
    assert torch.allclose(one, two, rtol=0.03)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_the_level_of_a_share_inverts_the_curve(share):
    levels = torch.logspace(-2, 2, 80, dtype=torch.float64)
    curve = 1 / (1 + levels**2)
    wanted = torch.tensor([share, float(curve[40])], dtype=torch.float64)
    level, own = levels_at(levels, curve, wanted).tolist()
    assert 1 / (1 + level**2) == pytest.approx(share, rel=0.02)
    assert own == pytest.approx(float(levels[40]))


def test_where_nothing_is_open_there_is_no_level():
    sure = torch.eye(10, dtype=torch.float64)
    assert ends(sure).isnan().all()


def few_open(seed, count=400, unsure=12):
    """Contexts of which nearly all are settled, as of small data that a pilot has learnt."""
    sure = open_questions(count - unsure, spread=200.0, seed=seed)
    return torch.cat([sure, open_questions(unsure, spread=2.0, seed=seed + 100)])


@pytest.mark.parametrize("make", [few_open, lambda seed: open_questions(150, 3.0, seed)])
def test_the_ends_are_steady_where_few_contexts_are_open(make):
    found = torch.stack([ends(make(seed), seed) for seed in range(6)])
    # the difference of entropies, which this was, gave 1.8 to 4.1 and 2.6 to 58 for one configuration
    assert (found.max(dim=0).values / found.min(dim=0).values < 1.25).all()


def test_the_ends_follow_what_is_open():
    two = torch.zeros(64, 10, dtype=torch.float64)
    two[:, :2] = 0.5
    even = torch.full((64, 10), 0.1, dtype=torch.float64)
    # at great noise the share is V / (2 sigma^2 H), with V the variance of the code: 1/2 and ln 2, 0.9 and ln 10
    assert float(ends(two)[1]) == pytest.approx(math.sqrt(0.5 / (0.002 * math.log(2))), rel=0.02)
    assert float(ends(even)[1]) == pytest.approx(math.sqrt(0.9 / (0.002 * math.log(10))), rel=0.02)


def answers(probabilities, pilots=2):
    rows = torch.cat([probabilities] * pilots)
    number = torch.arange(pilots).repeat_interleave(len(probabilities))
    return Answers(rows, number, torch.arange(len(probabilities)).repeat(pilots))


def test_the_standard_error_is_that_of_other_samples():
    # of one pilot's worth of answers, twice, so that the pilots' part is what the noise's draws make it
    found = []
    for seed in range(8):
        asked = answers(open_questions(200, 3.0, seed))
        found.append(measure(asked, gained(asked.probabilities, CODES, GRID, seed), GRID, ENDS))
    spread = float(torch.stack([one.logs for one in found]).std(dim=0).max())
    said = sum(one.error for one in found) / len(found)
    assert spread / 2 < said < 3 * spread and all(one.weight > 0.95 for one in found)


def test_pilots_that_differ_make_the_range_less_sure():
    one, two = open_questions(200, 1.0), open_questions(200, 12.0)
    asked = Answers(torch.cat([one, two]), torch.arange(2).repeat_interleave(200), torch.arange(200).repeat(2))
    alike = answers(one)
    apart = measure(asked, gained(asked.probabilities, CODES, GRID, 0), GRID, ENDS)
    same = measure(alike, gained(alike.probabilities, CODES, GRID, 0), GRID, ENDS)
    assert apart.error > 3 * same.error and apart.weight < same.weight


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
    monkeypatch.setattr(pilot_room, "PILOT_STEPS", 30)
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
    assert not torch.are_deterministic_algorithms_enabled()
    assert first["kind"] == "loguniform" and 0.05 < first["sigma_min"] < first["sigma_max"] < 100
    curve = first["calibration"]
    assert 0 < curve["left_open_nats"] <= math.log(10) and curve["weight"] > 0.9
    low, high = curve["measured"]
    levels, curve_shares = (torch.tensor(curve[key], dtype=torch.float64) for key in ("levels", "decided"))
    at = torch.searchsorted(levels, torch.tensor([low, high], dtype=torch.float64))
    assert curve_shares[at[0]] <= 0.05 <= curve_shares[at[0] - 1]
    assert curve_shares[at[1]] <= 0.001 <= curve_shares[at[1] - 1]
    # the range is the mean, in log sigma, of the measured and the stated one
    mean = curve["weight"] * math.log(low) + (1 - curve["weight"]) * math.log(curve["stated"][0])
    assert math.log(first["sigma_min"]) == pytest.approx(mean)


def test_pilots_are_asked_about_what_was_held_out_and_fitted_to_it(toy, monkeypatch):
    monkeypatch.setattr(pilot_room, "PILOT_LR", 1e-2)  # so that few steps teach them something
    monkeypatch.setattr(pilot_room, "PILOT_STEPS", 80)
    data = load_data(toy())
    asked = ask_pilots(toy(), data, make_codebook("orthogonal", 10, 16, 0))
    assert asked.probabilities.shape == (2 * (144 + 258), 10) and asked.probabilities.dtype == torch.float64
    for number in range(2):
        rows, sample = asked.probabilities[asked.pilot == number], asked.sample[asked.pilot == number]
        held_out = [data.validation.batch(sample[:144], torch.device("cpu"))["label"]]
        held_out.append(data.train.batch(sample[144:] - 144, torch.device("cpu"))["label"])
        assert temperature(rows.log(), torch.cat(held_out)) == pytest.approx(1, rel=0.03)


def test_a_pilot_never_trains_on_what_it_is_asked_about(toy):
    data = load_data(toy())
    seen = []
    for number in range(2):
        rest, fold = folded(data, number)
        both = torch.cat([rest.indices, fold.indices])
        assert torch.equal(both.sort().values, torch.arange(len(data.train)))
        seen.append(set(fold.indices.tolist()))
    assert len(seen[0]) == 258 and not seen[0] & seen[1]
    # enough validation samples: every training sample is trained on
    rest, fold = folded(DataSet(data.validation, data.train, data.test, data.shape), 1)
    assert rest is data.validation and len(fold) == 0


class Settled:
    """Pictures that show their class at every pixel: nothing is left open."""

    def __len__(self):
        return 600

    def batch(self, indices, device):
        label = indices % 10
        return {"image": ((label - 4.5) / 4.5)[:, None, None, None].expand(-1, 1, 8, 8).float(), "label": label}


@pytest.mark.parametrize("policy", ["calibrated", "equal_information"])
def test_data_that_leaves_nothing_open_gets_the_stated_range_and_a_warning(toy, monkeypatch, policy):
    monkeypatch.setattr(pilot_room, "PILOT_LR", 1e-2)
    monkeypatch.setattr(pilot_room, "PILOT_STEPS", 400)
    config, whole = toy(f"noise.ranges={policy}"), Settled()
    data = DataSet(whole, whole, whole, {"image": (1, 8, 8), "classes": 10})
    distribution = design(config, data, calibrate).distribution
    facts = distribution["calibration"]
    assert facts["weight"] < 0.5 and json.loads(json.dumps(facts, allow_nan=False)) == facts
    low, high = read_distribution(distribution).low, read_distribution(distribution).high
    assert [low, high] == pytest.approx(facts["stated"])
    told, warning = described(distribution)
    assert f"sigma {low:.3g} to {high:.3g}" in told and warning.startswith("warning: ")
    assert "noise.ranges=uniform" in warning


def test_the_stated_range_is_between_those_of_two_and_of_many_open_targets():
    rows = even_contexts(10)
    assert ((rows == 0.25).sum(dim=-1) == 4).all() and torch.allclose(rows.sum(dim=-1), torch.ones(64).double())
    assert (even_contexts(3) > 0).all()
    assert ends(rows).tolist() == pytest.approx([2.3, 16.45], rel=0.02)


def test_a_sure_range_is_described_in_a_line_and_one_that_was_not_measured_in_none(toy):
    config = toy()
    (line,) = described(design(config, load_data(config), calibrate).distribution)
    assert line.startswith("calibrated range: sigma ") and "one standard error" in line and "804 answers" in line
    assert described({"kind": "loguniform", "sigma_min": 1.0, "sigma_max": 2.0}) == []


def test_equal_information_splits_what_is_decided_equally(toy):
    config = toy("noise.ranges=equal_information")
    run_plan = design(config, load_data(config), calibrate)
    distribution = read_distribution(run_plan.distribution)
    curve = run_plan.distribution["calibration"]
    levels, shares = (torch.tensor(curve[key], dtype=torch.float64) for key in ("levels", "decided"))
    middle = math.log(run_plan.ranges.edges[1])
    at = int(torch.searchsorted(levels.log(), middle))
    # half of the information lies above the boundary
    assert float(shares[at]) <= 0.5 + 0.01 and float(shares[at - 1]) >= 0.5 - 0.01
    assert (distribution.low, distribution.high) == (run_plan.ranges.edges[-1], run_plan.ranges.edges[0])
