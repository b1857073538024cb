import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal, LogUniform
from dbtrain.method.ranges import Ranges, equal_shares, explicit

GOLDEN = {
    2: (0.3012,),
    3: (0.5050, 0.1796),
    4: (0.6766, 0.3012, 0.1341),
    6: (0.9617, 0.5050, 0.3012, 0.1796, 0.0943),
}
PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)

tilings = st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=9, unique=True).map(
    lambda edges: Ranges(tuple(sorted(edges, reverse=True)))
)


def owner(ranges, level):
    """The definition, in plain words: slice b is (low, high]; what lies outside belongs to the nearest."""
    if level > ranges.edges[0]:
        return 0
    inside = (b for b in range(ranges.blocks) if ranges.edges[b + 1] < level <= ranges.edges[b])
    return next(inside, ranges.blocks - 1)


@pytest.mark.parametrize("blocks", GOLDEN)
def test_boundaries_are_those_of_the_paper(blocks):
    edges = equal_shares(PAPER, blocks).edges
    assert tuple(round(edge, 4) for edge in edges[1:-1]) == GOLDEN[blocks]
    assert (edges[0], edges[-1]) == (80.0, 0.002)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 24])
def test_every_slice_has_an_equal_share_of_the_training_levels(blocks):
    cdf = PAPER.cdf(torch.tensor(equal_shares(PAPER, blocks).edges, dtype=torch.float64))
    assert torch.allclose(-cdf.diff(), torch.full((blocks,), 1 / blocks, dtype=torch.float64), atol=1e-9)


def test_log_uniform_slices_have_equal_log_width():
    edges = equal_shares(LogUniform(0.01, 10.0), 3).edges
    assert edges == pytest.approx((10.0, 1.0, 0.1, 0.01))


@given(tilings)
def test_slices_tile_without_gap_and_block_0_is_the_noisiest(ranges):
    slices = [ranges.of(b) for b in range(ranges.blocks)]
    assert slices[0][1] == max(ranges.edges) and slices[-1][0] == min(ranges.edges)
    assert all(upper[0] == lower[1] for upper, lower in zip(slices, slices[1:], strict=False))
    assert all(low < high for low, high in slices)


@given(tilings)
def test_an_edge_and_its_two_neighbours_have_the_owners_that_half_open_intervals_give(ranges):
    levels = [
        level
        for edge in ranges.edges
        for level in (math.nextafter(edge, 0), edge, math.nextafter(edge, math.inf))
        if level > 0
    ]
    got = ranges.block_of(torch.tensor(levels, dtype=torch.float64)).tolist()
    assert got == [owner(ranges, level) for level in levels]
    for b in range(ranges.blocks):
        assert int(ranges.block_of(torch.tensor(ranges.of(b)[1], dtype=torch.float64))) == b


@given(tilings, st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=30))
def test_block_of_is_one_function_of_the_level_whatever_the_shape(ranges, levels):
    flat = torch.tensor(levels, dtype=torch.float64)
    together = ranges.block_of(flat)
    assert together.dtype == torch.int64
    assert together.tolist() == [owner(ranges, level) for level in levels]
    assert ranges.block_of(flat.reshape(1, -1, 1)).flatten().tolist() == together.tolist()
    assert [int(ranges.block_of(level)) for level in flat] == together.tolist()


@given(tilings)
def test_block_of_does_not_rise_with_the_noise(ranges):
    levels = torch.logspace(-5, 4, 200, dtype=torch.float64)
    assert (ranges.block_of(levels).diff() <= 0).all()


@given(tilings)
def test_hex_round_trip_is_exact(ranges):
    assert Ranges.from_hex([edge.hex() for edge in ranges.edges]) == ranges


@given(tilings, st.floats(0, 0.5))
def test_widened_holds_the_slice_and_stays_in_the_full_range(ranges, overlap):
    for b in range(ranges.blocks):
        (low, high), (wide_low, wide_high) = ranges.of(b), ranges.widened(b, overlap)
        assert ranges.edges[-1] <= wide_low <= low < high <= wide_high <= ranges.edges[0]


def test_widened_adds_the_share_of_the_log_width_at_both_ends():
    low, high = Ranges((1000.0, 100.0, 1.0, 0.001)).widened(1, 0.1)
    assert (low, high) == pytest.approx((10**-0.2, 10**2.2))


def test_masked_shares_reach_0_and_are_widened_by_their_width():
    ranges = Ranges((1.0, 0.7, 0.3, 0.0))
    assert [ranges.widened(b, 0.5) for b in range(3)] == [
        pytest.approx(wide) for wide in ((0.55, 1.0), (0.1, 0.9), (0.0, 0.45))
    ]


def test_no_overlap_means_the_exact_slice():
    ranges = equal_shares(PAPER, 3)
    assert [ranges.widened(b, 0.0) for b in range(3)] == [ranges.of(b) for b in range(3)]


@pytest.mark.parametrize(
    "edges",
    [(1.0,), (), (1.0, 1.0), (1.0, 2.0), (2.0, 1.0, 1.5), (math.inf, 1.0), (1.0, math.nan), (1.0, -0.5)],
    ids=str,
)
def test_edges_that_do_not_tile_are_refused(edges):
    with pytest.raises(ConfigError, match="do not tile"):
        Ranges(edges)


def test_explicit_edges_are_taken_as_they_are_and_counted():
    assert explicit((9, 3.0, 0.1), 2).edges == (9.0, 3.0, 0.1)
    with pytest.raises(ConfigError, match="3 values; blocks=3 needs 4"):
        explicit((9.0, 3.0, 0.1), 3)


@given(tilings, st.sampled_from([0.0, 0.05, 0.5]))
def test_the_owner_of_an_edge_and_of_its_neighbours_was_trained_there(ranges, overlap):
    """So a sampler asks nobody for a level at which it never was."""
    for edge in ranges.edges[1:-1]:
        for level in (edge, math.nextafter(edge, math.inf), math.nextafter(edge, 0.0)):
            block = ranges.owner(level)
            low, high = ranges.widened(block, overlap)
            assert low <= level <= high and block in ranges.trained_at(level, overlap)


@pytest.mark.parametrize("distribution", [PAPER, LogUniform(0.01, 10.0)])
def test_a_million_draws_fall_into_each_block_by_its_share(distribution):
    count = 1_000_000
    levels = GaussianNoise(distribution).quantile(Draws(torch.tensor(7), torch.arange(count)).uniform((), 0))
    high, low = distribution.high, distribution.low
    for ranges in (equal_shares(distribution, 3), Ranges((high, 0.9, 0.2, low))):
        shares = -distribution.cdf(torch.tensor(ranges.edges, dtype=torch.float64)).diff()
        found = ranges.block_of(levels).bincount(minlength=3).double() / count
        # five standard deviations of a share
        assert ((found - shares).abs() <= 5 * (shares * (1 - shares) / count).sqrt()).all()
