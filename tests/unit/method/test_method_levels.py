import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.errors import ConfigError
from dbtrain.method.levels import LogNormal, LogUniform, Tabulated

shares = st.floats(0, 1)


@st.composite
def distributions(draw):
    kind = draw(st.sampled_from(["lognormal", "loguniform", "table"]))
    mean, std = draw(st.floats(-3, 3)), draw(st.floats(0.3, 2))
    low, high = math.exp(mean - std * draw(st.floats(0.5, 3))), math.exp(mean + std * draw(st.floats(0.5, 3)))
    if kind == "lognormal":
        return LogNormal(mean, std, low, high)
    if kind == "loguniform":
        return LogUniform(low, high)
    count = draw(st.integers(2, 8))
    gaps = draw(st.lists(st.floats(0.05, 1), min_size=count - 1, max_size=count - 1))
    heights = [sum(gaps[:i]) / sum(gaps) for i in range(count - 1)] + [1.0]
    return Tabulated(torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist(), heights)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


@given(distributions(), shares)
def test_cdf_inverts_quantile(distribution, share):
    assert float(distribution.cdf(distribution.quantile(double(share)))) == pytest.approx(share, abs=1e-9)


@given(distributions(), shares)
def test_quantile_inverts_cdf(distribution, part):
    level = distribution.low * (distribution.high / distribution.low) ** part
    assert float(distribution.quantile(distribution.cdf(double(level)))) == pytest.approx(level, rel=1e-9)


@given(distributions())
def test_the_ends_of_the_range_have_shares_0_and_1(distribution):
    assert distribution.cdf(double([distribution.low, distribution.high])).tolist() == pytest.approx([0, 1], abs=1e-9)
    ends = distribution.quantile(double([0.0, 1.0])).tolist()
    assert ends == pytest.approx([distribution.low, distribution.high], rel=1e-9)


@given(distributions())
def test_cdf_rises_and_is_flat_outside(distribution):
    grid = torch.logspace(-6, 6, 300, dtype=torch.float64)
    cdf = distribution.cdf(grid)
    assert (cdf.diff() >= 0).all()
    assert (cdf[grid < distribution.low] == 0).all() and (cdf[grid > distribution.high] == 1).all()


def test_log_normal_is_the_truncated_normal_of_log_sigma():
    distribution = LogNormal(-1.2, 1.2, 0.002, 80.0)
    phi = torch.distributions.Normal(double(-1.2), double(1.2)).cdf
    low, high = phi(double(0.002).log()), phi(double(80.0).log())
    levels = double([0.01, 0.3012, 1.0, 10.0])
    assert torch.allclose(distribution.cdf(levels), (phi(levels.log()) - low) / (high - low), atol=1e-12)


def test_table_is_linear_in_log_level():
    table = Tabulated([0.01, 1.0, 100.0], [0.0, 0.75, 1.0])
    assert table.cdf(double([0.1, 10.0])).tolist() == pytest.approx([0.375, 0.875])
    assert table.quantile(double([0.375, 0.75, 0.875])).tolist() == pytest.approx([0.1, 1.0, 10.0])


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)], ids=str
)
def test_an_empty_or_infinite_range_is_refused(low, high):
    for make in (LogUniform, lambda a, b: LogNormal(0.0, 1.0, a, b)):
        with pytest.raises(ConfigError, match="sigma_min"):
            make(low, high)


def test_a_range_without_mass_and_a_spread_that_is_not_positive_are_refused():
    with pytest.raises(ConfigError, match="holds a share of"):
        LogNormal(-1.2, 0.1, 50.0, 80.0)
    with pytest.raises(ConfigError, match="p_std=0"):
        LogNormal(-1.2, 0.0, 0.002, 80.0)


@pytest.mark.parametrize(
    ("levels", "heights"),
    [
        ([1.0], [0.0]),
        ([1.0, 2.0], [0.0, 0.9]),
        ([1.0, 2.0], [0.1, 1.0]),
        ([1.0, 2.0, 2.0], [0.0, 0.5, 1.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 1.0]),
        ([1.0, 2.0, 3.0], [0.0, 1.0]),
    ],
    ids=str,
)
def test_a_table_that_does_not_rise_from_0_to_1_is_refused(levels, heights):
    with pytest.raises(ConfigError, match="must rise strictly"):
        Tabulated(levels, heights)
