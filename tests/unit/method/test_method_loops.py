import pytest

from dbtrain.errors import ConfigError
from dbtrain.method.loops import check_loops, order


@pytest.mark.parametrize(
    ("layers", "loops", "applied"),
    [
        (range(4), [1, 2, 2, 1], (0, 1, 2, 1, 2, 3)),  # neighbours with the same count as one group
        (range(4), [2, 2, 3, 3], (0, 1, 0, 1, 2, 3, 2, 3, 2, 3)),
        (range(4), [3, 1, 3, 1], (0, 0, 0, 1, 2, 2, 2, 3)),
        (range(2, 5), [9, 9, 2, 2, 1], (2, 3, 2, 3, 4)),  # counts belong to numbers in the whole model
        (range(1, 3), [2, 2, 2, 2], (1, 2, 1, 2)),  # a group ends where the block does
        (range(2, 5), None, (2, 3, 4)),
        (range(2, 5), [1] * 5, (2, 3, 4)),
    ],
)
def test_layers_are_applied_in_order_and_groups_as_a_whole(layers, loops, applied):
    assert order(layers, loops) == applied


@pytest.mark.parametrize(
    ("loops", "whole"), [((1, 2), "1, 2, 1, 2, 1"), ((1, 2, 3, 4, 5, 6), "1, 2, 3, 4, 5"), ((), "1, 1, 1, 1, 1")]
)
def test_a_list_of_another_length_is_refused_with_one_that_fits(loops, whole):
    with pytest.raises(ConfigError, match=rf"has {len(loops)} counts.*model.depth=5 .*'model.loops=\[{whole}\]'"):
        check_loops(loops, 5)
    check_loops(None, 5)
    check_loops((1, 2, 1, 2, 1), 5)
