import pytest
import torch

from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.evaluation import losses as room
from dbtrain.evaluation.loading import all_blocks
from dbtrain.evaluation.losses import grid
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.method.split import global_name
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data

SMALL = {
    "name": "toy",
    "blocks": 3,
    "model": {"arch": "dit", "depth": 3, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return load_data(load_config(None, base=SMALL))


def test_levels_are_equal_shares_with_their_owners_and_boundaries_with_both(data):
    run_plan = design(load_config(None, base=SMALL), data, lambda *_: {})
    rows = grid(run_plan, 12)
    inner = [row for row in rows if not row[2]]
    assert [block for _, block, _ in inner] == [0] * 4 + [1] * 4 + [2] * 4
    _, first, second, _ = run_plan.ranges.edges
    meeting = [row for row in rows if row[2]]
    assert meeting == [(first, 0, True), (first, 1, True), (second, 1, True), (second, 2, True)]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    # a block is never asked at a level that it was not trained at
    for level, block, _ in rows:
        low, high = run_plan.ranges.of(block)
        assert low <= level <= high


def test_a_loss_is_that_of_the_training_objective_at_the_level(data):
    """An untrained network returns c_skip * z, whose squared error is known."""
    run_plan = design(load_config(None, base=SMALL), data, lambda *_: {})

    def load(block):
        return {global_name(block, n): t for n, t in run_plan.model(block).state_dict().items()}

    model = MergedModel(run_plan, all_blocks(run_plan, load, CPU), CPU)
    image = data.validation.batch(torch.arange(len(data.validation)), CPU)["image"]
    for level in (0.05, 0.3, 2.0):
        block = int(run_plan.ranges.block_of(torch.tensor(level)))
        point = room._point(model, data.validation, len(data.validation), (level, block, False))
        skip = 0.25 / (level**2 + 0.25)
        expected = (1 - skip) ** 2 * float(image.square().mean()) + (skip * level) ** 2
        assert point.loss == pytest.approx(expected, rel=0.05)
        weight = (level**2 + 0.25) / (0.5 * level) ** 2  # EDM, Table 1
        assert point.weighted == pytest.approx(weight * point.loss, rel=1e-4)


def test_a_run_without_noise_has_no_such_curve(data):
    base = {**SMALL, "blocks": 1, "method": "end_to_end", "codebook": {"dim": 16}}
    config = load_config(None, base={**base, "model": {**SMALL["model"], "arch": "vit"}})
    with pytest.raises(ConfigError, match="trained without noise"):
        grid(design(config, data, lambda *_: {}), 4)
