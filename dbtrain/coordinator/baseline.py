"""The end-to-end baseline: the same layers as one network, trained for the FLOPs that the blocks take together."""

from dbtrain.config import Config
from dbtrain.coordinator.memory import estimate
from dbtrain.coordinator.settle import design
from dbtrain.training.blueprint import load_data


def end_to_end(config: Config) -> Config:
    """Configuration of the baseline of a run.

    Steps are the blocks' steps times the ratio of their FLOPs a sample (their private stems and heads included) to
    those of the whole network, both counted by PyTorch on the same batch.
    """
    data = load_data(config)
    counted = config
    if config.noise.ranges in ("calibrated", "equal_information"):
        # what a pilot would measure changes no FLOPs
        counted = config.model_copy(update={"noise": config.noise.model_copy(update={"ranges": "uniform"})})
    whole = _whole(counted)
    blocks = design(counted, data, _never)
    batch = 2
    per_step = sum(estimate(blocks, b, batch, 1).flops for b in range(blocks.split.blocks))
    steps = round(config.training.steps * per_step / estimate(design(whole, data, _never), 0, batch, 1).flops)
    training = config.training.model_copy(update={"steps": steps})
    return _whole(config).model_copy(update={"training": training})


def _whole(config: Config) -> Config:
    noise = config.noise
    if noise.edges:
        # the same range in one slice; an architecture that is shown no noise ignores it
        noise = noise.model_copy(update={"edges": (noise.edges[0], noise.edges[-1])})
    cluster = config.cluster.model_copy(update={"blocks": {}})
    return config.model_copy(
        update={
            "name": f"{config.name}-end-to-end",
            "method": "end_to_end",
            "blocks": 1,
            "layers_per_block": None,
            "noise": noise,
            "cluster": cluster,
        }
    )


def _never(*_: object) -> dict[str, object]:
    raise AssertionError("counting FLOPs needs no calibration")
