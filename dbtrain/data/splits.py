"""What a data set offers: named splits, each of which makes a batch from sample numbers."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dbtrain.data.batching import send
from dbtrain.errors import DataError
from dbtrain.method.draws import derive_seed


class Split(Protocol):
    """A sequence of samples."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Named tensors of the samples (len(indices), ...) on `device`."""


@dataclass(frozen=True)
class DataSet:
    """Train, validation and test splits, and the shape that a model needs to know."""

    train: Split
    validation: Split
    test: Split
    shape: dict[str, object]
    """Arguments of the model that follow from the data, such as ``image=(1, 28, 28)`` and ``classes=10``."""
    content: str = ""
    """Hash of what the splits hold, by which a run knows its data again; '' where nobody will ask."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty where there are no classes, or they have no
    names."""
    notes: tuple[str, ...] = ()
    """What people should be told of the data: how much there is,
    and which splits were made for want of their own."""


def check_labels(count: int, labels: Tensor, classes: int) -> None:
    """Refuse labels (n,) that do not fit `count` images.

    Raises:
        DataError: counts differ, there is no image, or a label is out of range.
    """
    if count != len(labels) or not count:
        raise DataError(f"{count} images and {len(labels)} labels: the counts must agree and not be zero")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(
            f"label {int(labels[at])} of sample {at} is out of range: {classes} classes are numbered from 0 to "
            f"{classes - 1}; fix the data or set data.classes"
        )


RESIDENT = 2 << 30
"""Bytes of images up to which they are moved to a device once; of more, each batch is sent."""


class LabelledImages:
    """Images kept as bytes, moved to a device once unless they are many, and normalised when a batch is made.

    Args:
        images: (n, C, H, W) uint8.
        labels: (n,) int64.
        classes: number of classes.
        scale: value that stands for white.

    Raises:
        DataError: counts differ, there is no image, or a label is out of range.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int, scale: float = 255.0) -> None:
        check_labels(len(images), labels, classes)
        self.images, self.labels, self.classes, self.scale = images, labels, classes, scale

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """``image`` (n, C, H, W) float32 in [-1, 1] and ``label`` (n,)."""
        if self.images.device != device and self.images.nbytes <= RESIDENT:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        at = send(indices, self.images.device)
        images, labels = send(self.images[at], device), send(self.labels[at], device)
        return {"image": images.float() * (2 / self.scale) - 1, "label": labels}

    def part(self, start: int, stop: int) -> "LabelledImages":
        """The samples from `start` to `stop`."""
        return LabelledImages(self.images[start:stop], self.labels[start:stop], self.classes, self.scale)

    def mixed(self) -> "LabelledImages":
        """The samples in the order of :func:`mixed`."""
        order = mixed(len(self))
        return LabelledImages(self.images[order], self.labels[order], self.classes, self.scale)


def mixed(count: int) -> Tensor:
    """A fixed random order (count,), for data that may be sorted by class:
    its last share would lack classes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed("dbtrain", "held out")))


def evenly(size: int, most: int | None) -> Tensor:
    """Numbers of at most `most` samples (all if None), evenly spread over `size`."""
    return spread(size, size if most is None else min(most, size))


def spread(size: int, count: int) -> Tensor:
    """Numbers (count,) evenly spread over `size` samples, some more than once if there are fewer."""
    return torch.arange(count) * size // count


def partners(order: Tensor) -> Tensor:
    """The sample that each of n is put beside, (n,): the one before it in an order (n,);
    never itself if n > 1."""
    return torch.empty_like(order).index_copy(0, order, order.roll(1))


def hold_out(whole: LabelledImages, share: float) -> tuple[LabelledImages, LabelledImages]:
    """Split off the last `share` of the samples, in their order here, for validation.

    Raises:
        DataError: nothing would be left on one side.
    """
    cut = len(whole) - round(len(whole) * share)
    if not 0 < cut < len(whole):
        raise DataError(f"data.validation={share} leaves {cut} of {len(whole)} samples for training")
    return whole.part(0, cut), whole.part(cut, len(whole))
