from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dbtrain.config import EvaluationConfig
from dbtrain.evaluation.accuracy import accuracy
from dbtrain.evaluation.blocks import AllBlocks
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.method.interface import Example
from dbtrain.run.make_plan import design
from tests.unit.conftest import never

CPU = torch.device("cpu")


class Labelled:
    """Fifty samples of ten classes in turn, or sorted by class, whose one pixel is the class."""

    def __init__(self, is_sorted=False):
        self.is_sorted = is_sorted

    def __len__(self):
        return 50

    def batch(self, indices, device):
        label = indices // 5 if self.is_sorted else indices % 10
        return {"image": label.float()[:, None, None, None], "label": label}


def reader(codes, reads):
    """A block that answers with what its code is nearest to, or with what the image says."""

    def predict(layers, noisy, level, context):
        return 100 * (noisy @ codes.T if reads == "code" else torch.eye(10)[context.flatten().long()])

    return SimpleNamespace(
        example=lambda batch: Example(codes[batch["label"]], batch["image"], batch["label"]),
        predict=predict,
        denoised=lambda output: output.softmax(dim=-1) @ codes,
    )


def merged(make_config, digits, reads, high):
    ranges = ["noise.ranges=explicit", f"noise.edges=[{high},{high / 2},{high / 4},{high / 8}]"]
    model = MergedModel.__new__(MergedModel)
    model.run_plan, model.device = design(make_config(*ranges), digits, never), CPU
    model.blocks = AllBlocks([reader(model.run_plan.codebook, reads)] * 3, CPU)
    return model


@pytest.mark.parametrize(
    ("reads", "high", "least", "most"), [("code", 0.1, 1, 1), ("code", 1000, 0, 0.4), ("image", 0.1, 0, 0.25)]
)
@pytest.mark.parametrize("is_sorted", [False, True], ids=["mixed", "sorted"])
def test_scrambled_is_what_the_noisy_code_alone_gives_away(make_config, digits, reads, high, least, most, is_sorted):
    # the last batch of the fifty is of one sample
    scores = accuracy(merged(make_config, digits, reads, high), Labelled(is_sorted), EvaluationConfig(batch_size=7))
    assert least <= scores["scrambled"] <= most
    # from zeros, as the chain starts, a code tells nothing; an image tells all
    assert scores["mean"] == pytest.approx(1 if reads == "image" else 0.1)


def test_scores_do_not_depend_on_how_the_samples_are_cut_into_batches(make_config, digits):
    model = merged(make_config, digits, "code", 1.0)
    section = EvaluationConfig(start="noise")
    model.run_plan = replace(model.run_plan, config=model.run_plan.config.model_copy(update={"evaluation": section}))
    whole, cut = (accuracy(model, Labelled(), section.model_copy(update={"batch_size": n})) for n in (50, 7))
    assert whole == cut and 0 < whole["mean"] < 0.5


def test_controls_can_be_left_out(make_config, digits):
    model = merged(make_config, digits, "code", 1.0)
    assert {"scrambled", "shuffled"} <= set(accuracy(model, Labelled(), EvaluationConfig()))
    assert not {"scrambled", "shuffled"} & set(accuracy(model, Labelled(), EvaluationConfig(controls=False)))
