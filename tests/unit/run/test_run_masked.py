"""A run that masks tokens is settled by the same plan: equal decrements of alpha, no codebook."""

import pytest
import torch

from dbtrain.config import load_config
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError
from dbtrain.method.masking import MaskingNoise
from dbtrain.run.cost import estimate
from dbtrain.run.make_plan import design
from tests.unit.conftest import SMALL, never

# the noise is masking's own default, and there is no codebook
BASE = {
    **{name: section for name, section in SMALL.items() if name not in ("noise", "codebook")},
    "model": {"arch": "masked_lm", "depth": 6, "dim": 16, "heads": 2},
}
TOKENS = DataSet(None, None, None, {"length": 12, "vocabulary": 5})  # type: ignore[arg-type]


def settled(*overrides, data=TOKENS):
    return design(load_config(None, overrides, base=BASE), data, never)


def test_the_default_ranges_are_equal_decrements_of_alpha():
    run_plan = settled()
    assert run_plan.ranges.edges == pytest.approx((1, 2 / 3, 1 / 3, 0))
    assert run_plan.codebook is None
    noise = run_plan.noise()
    assert isinstance(noise, MaskingNoise) and noise.mask == 5


def test_a_block_is_trained_on_its_own_slice_exactly_and_can_be_counted():
    run_plan = settled()
    objective = run_plan.objective(1)
    assert (objective.q_low, objective.q_high) == pytest.approx(((1 / 3) ** 0.5, (2 / 3) ** 0.5))
    batch = {"tokens": torch.zeros(4, 12, dtype=torch.int64)}
    loss = objective(batch, torch.tensor(1), torch.arange(4))
    loss.backward()
    assert torch.isfinite(loss)
    assert estimate(run_plan, 0, 8, 1).flops > 0


def test_masked_shares_can_be_given():
    assert settled("noise.ranges=explicit", "noise.edges=[1,0.5,0.2,0]").ranges.edges == (1, 0.5, 0.2, 0)


def test_end_to_end_is_the_same_noise_in_one_block():
    run_plan = settled("method=end_to_end", "blocks=1")
    assert run_plan.ranges.edges == (1, 0) and run_plan.split.layers(0) == range(6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["noise.ranges=calibrated"], "noise.ranges=calibrated is for Gaussian noise, and masked_lm masks tokens"),
        (["noise.ranges=explicit", "noise.edges=[0.9,0.5,0.2,0]"], "must fall from 1 to 0"),
        (["noise.weighting=edm"], "noise.weighting=edm is for Gaussian noise"),
        (["model={arch: vit, depth: 6}"], "model.arch=vit needs data with classes and image"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settled(*overrides)


def test_a_gaussian_model_has_no_alpha(make_config, digits):
    with pytest.raises(ConfigError, match="noise.ranges=alpha is for masking, and vit has Gaussian noise"):
        design(make_config("noise.ranges=alpha"), digits, never)
