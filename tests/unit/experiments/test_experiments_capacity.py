import pytest

from dbtrain.errors import ConfigError
from dbtrain.experiments import capacity
from dbtrain.run.cost import estimate
from dbtrain.run.make_plan import design
from tests.unit.conftest import never

MIB = 1 << 20


def test_the_largest_depth_fits_and_one_layer_more_does_not(make_config, digits):
    config = make_config("model.dim=64", "training.batch_size=16")
    memory = 45 * MIB
    depths = capacity.largest_depths(config, digits, 16, memory)
    layers = depths[1]
    assert layers > 2 and depths == {blocks: blocks * layers for blocks in (1, 2, 4, 8)}

    def needs(depth):
        deeper = make_config("model.dim=64", "training.batch_size=16", "blocks=1", f"model.depth={depth}")
        return estimate(design(deeper, digits, never), 0, 16, 1).total

    assert needs(layers) <= memory < needs(layers + 1)


def test_who_does_not_need_blocks_is_told_and_by_which_means(make_config, digits):
    config = make_config("blocks=1", "model.dim=64", "training.batch_size=256")
    whole = design(config, digits, never)
    plain = estimate(whole, 0, 256, 1).total
    checkpointed = estimate(
        design(
            make_config(
                "blocks=1", "model.dim=64", "training.batch_size=256", "training.activation_checkpointing=true"
            ),
            digits,
            never,
        ),
        0,
        256,
        1,
    ).total
    assert checkpointed < plain

    def told(memory, device="cpu"):
        return next(iter(capacity.lines(config, digits, whole, 256, memory, device)))

    enough, little, none = (told(memory) for memory in (plain, plain - 1, MIB))
    assert "would fit end to end" in enough and "as it is" in enough
    assert "plain training is the simpler choice" in enough
    assert "would fit" in little and "with activation checkpointing" in little
    assert "does not fit" in none and "offloaded" in none
    assert told(None) == "there is no GPU here: --memory 80GiB says what would fit on one of that size"
    assert told(None, "cuda").startswith("how much memory those GPUs have is not known here: --memory 80GiB")


@pytest.mark.parametrize(("given", "bytes_"), [("80GiB", 80 << 30), ("512MiB", 512 << 20), ("1.5GiB", 3 << 29)])
def test_memory_is_a_number_with_its_unit(given, bytes_):
    assert capacity.memory_of(given) == bytes_


@pytest.mark.parametrize("given", ["80", "80GB", "", "-1GiB", "0GiB"])
def test_what_is_no_size_is_refused_with_an_example(given):
    with pytest.raises(ConfigError, match="80GiB"):
        capacity.memory_of(given)
