import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.errors import ConfigError
from dbtrain.method.split import global_name, local_name, split_by_sizes, split_evenly


@given(st.integers(1, 200).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_even_splits_hold_every_layer_once_and_differ_by_one_at_most(case):
    depth, blocks = case
    split = split_evenly(depth, blocks)
    assert split.blocks == blocks
    assert [layer for b in range(blocks) for layer in split.layers(b)] == list(range(depth))
    sizes = [len(split.layers(b)) for b in range(blocks)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_sizes_are_taken_as_they_are():
    split = split_by_sizes(6, [1, 3, 2])
    assert [split.layers(b) for b in range(3)] == [range(1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize("blocks", [0, -1, 7])
def test_more_blocks_than_layers_or_none_are_refused(blocks):
    with pytest.raises(ConfigError, match=f"blocks={blocks} cannot share 6 layers.*from 1 to 6"):
        split_evenly(6, blocks)


@pytest.mark.parametrize("sizes", [[2, 2], [2, 2, 3], [3, 0, 3], [7, -1]], ids=str)
def test_sizes_that_do_not_add_up_are_refused(sizes):
    with pytest.raises(ConfigError, match=f"model.depth=6 .*{sum(sizes)}"):
        split_by_sizes(6, sizes)


@pytest.mark.parametrize(
    ("local", "merged"),
    [
        ("stem.patch.weight", "blocks.2.stem.patch.weight"),
        ("head.linear.bias", "blocks.2.head.linear.bias"),
        ("layers.4.mlp.0.weight", "layers.4.mlp.0.weight"),
    ],
)
def test_names_go_to_the_merged_model_and_back(local, merged):
    assert global_name(2, local) == merged
    assert local_name(2, merged) == local


@pytest.mark.parametrize("name", ["codebook", "codebook.table", "stemx.weight", "blocks.2.stem.weight", "body.w", ""])
def test_a_parameter_outside_the_groups_is_refused(name):
    with pytest.raises(ValueError, match="none of the groups"):
        global_name(2, name)


@pytest.mark.parametrize(
    "name",
    ["blocks.1.stem.w", "blocks.22.stem.w", "stem.w", "head.w", "blocks.2.codebook", "blocks.2.layers.0.w", "codebook"],
)
def test_a_name_of_another_block_is_refused(name):
    with pytest.raises(ValueError, match="not a parameter of block 2"):
        local_name(2, name)


def test_names_of_all_blocks_of_a_model_never_collide():
    split = split_evenly(6, 3)
    names = [
        global_name(b, name)
        for b in range(3)
        for name in ("stem.w", "head.w", *(f"layers.{i}.w" for i in split.layers(b)))
    ]
    assert len(names) == len(set(names)) == 12
