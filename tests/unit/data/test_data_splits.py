import pytest
import torch

from dbtrain.data.splits import LabelledImages, hold_out
from dbtrain.errors import DataError

CPU = torch.device("cpu")


def images(count=10, classes=10, labels=None):
    pixels = torch.arange(count * 4, dtype=torch.uint8).reshape(count, 1, 2, 2)
    return LabelledImages(pixels, torch.arange(count) if labels is None else torch.tensor(labels), classes)


def test_a_batch_has_the_samples_asked_for_between_minus_1_and_1():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1)
    batch = LabelledImages(pixels, torch.tensor([4, 5, 6]), 10).batch(torch.tensor([2, 0, 1, 1]), CPU)
    assert batch["image"].flatten().tolist() == pytest.approx([-0.6, -1.0, 1.0, 1.0])
    assert batch["image"].shape == (4, 1, 1, 1) and batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == [6, 4, 5, 5]


@pytest.mark.parametrize(("share", "held"), [(0.1, 1), (0.5, 5), (0.25, 2)])
def test_the_last_share_is_held_out(share, held):
    rest, out = hold_out(images(), share)
    assert rest.labels.tolist() == list(range(10 - held)) and out.labels.tolist() == list(range(10 - held, 10))
    assert torch.equal(torch.cat([rest.images, out.images]), images().images)
    assert (rest.classes, rest.scale) == (10, 255.0)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_side_empty_is_refused(share):
    with pytest.raises(DataError, match=f"data.validation={share} leaves"):
        hold_out(images(), share)


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 3, 1], "label 3 of sample 1"), ([0, 1, -1], "label -1 of sample 2")]
)
def test_labels_out_of_range_are_refused_with_the_first_sample(labels, message):
    with pytest.raises(DataError, match=message + ".*3 classes are numbered from 0 to 2"):
        images(3, 3, labels)


@pytest.mark.parametrize(("count", "labels"), [(3, [0, 1]), (2, [0, 1, 1]), (0, [])], ids=str)
def test_counts_that_differ_or_are_zero_are_refused(count, labels):
    with pytest.raises(DataError, match=f"{count} images and {len(labels)} labels"):
        images(count, 3, labels)
