"""A recurrent core is one block; its end-to-end baseline iterates, and each of its steps costs more."""

import pytest

from dbtrain.config import load_config
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError
from dbtrain.method.gaussian import GaussianNoise, NoNoise
from dbtrain.run.cost import estimate
from dbtrain.run.make_plan import design
from tests.unit.conftest import SMALL, never

BASE = {
    **SMALL,
    "blocks": 1,
    "model": {"arch": "recurrent", "depth": 2, "dim": 16, "heads": 2, "iterations": 6, "backprop": 2},
    "codebook": {"dim": 8},
}
TOKENS = DataSet(None, None, None, {"length": 12, "vocabulary": 5})


def settled(*overrides):
    return design(load_config(None, overrides, base=BASE), TOKENS, never)


def test_the_blocks_model_is_the_denoiser_and_the_baseline_the_iteration():
    one, whole = settled(), settled("method=end_to_end")
    assert isinstance(one.noise(), GaussianNoise) and isinstance(whole.noise(), NoNoise)
    assert one.model(0).iterations == 1
    assert (whole.model(0).iterations, whole.model(0).backprop, whole.noise().spread) == (6, 2, 1.0)


def test_the_baselines_step_costs_its_iterations():
    # in units of a layer's forward pass, backward being two: prelude and coda, then the core of two layers
    single, unrolled = 3 * 2 + 3 * 2, 3 * 2 + 2 * (6 + 2 * 2)
    one, whole = (estimate(b, 0, 8, 1).flops for b in (settled(), settled("method=end_to_end")))
    assert whole / one == pytest.approx(unrolled / single, rel=0.2)


def test_more_than_one_block_is_refused():
    with pytest.raises(ConfigError, match="blocks=2: model.arch=recurrent is one denoiser .* set blocks=1"):
        settled("blocks=2")
