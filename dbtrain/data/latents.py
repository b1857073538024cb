"""Latents (or any real images) with classes, from tensor files that some encoder wrote."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dbtrain.data.batching import send
from dbtrain.data.content import samples_hash
from dbtrain.data.splits import DataSet, check_labels, mixed
from dbtrain.errors import DataError

ReadTensors = Callable[[Path], dict[str, Tensor]]
"""Tensors of a file by name; raises DataError."""

TARGET_STD = 0.5
"""EDM's sigma_data, to which latents are scaled."""
PIECE = 4096
"""Latents that are checked at once."""


class LabelledLatents:
    """Latents (n, C, H, W) float32 and labels (n,) int64, scaled when a batch is made.

    Raises:
        DataError: counts differ, or a label is out of range.
    """

    def __init__(self, latents: Tensor, labels: Tensor, classes: int, scale: float) -> None:
        check_labels(len(latents), labels, classes)
        self.latents, self.labels, self.scale = latents, labels, scale

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """``image`` (n, C, H, W) float32 and ``label`` (n,)."""
        if self.latents.device != device:
            self.latents, self.labels = self.latents.to(device), self.labels.to(device)
        at = send(indices, device)
        return {"image": self.latents[at].float() * self.scale, "label": self.labels[at]}


def latents(
    path: str, labels: str | None, classes: int, scale: float | None, validation: float, test: float, read: ReadTensors
) -> DataSet:
    """Latents from `path`: of a fixed permutation the last `test` share is the test set,
    `validation` that before it.

    A file may be sorted by class, and its last share then lack most of them.

    Args:
        path: a safetensors file with ``latent`` (n, C, H, W) and ``label`` (n,),
            or a .npy file of the latents.
        labels: a .npy file of the labels, for latents in a .npy file.
        scale: factor on every latent; by default such that the training split's standard deviation is 0.5.

    Raises:
        DataError: a file is missing or damaged, or does not hold what it should.
    """
    values, numbers = _read(Path(path), labels, read)
    _check_values(path, values)
    try:
        check_labels(len(values), numbers, classes)  # names a sample by its place in the file
    except DataError as error:
        raise DataError(f"{labels or path}: {error}") from error
    order = mixed(len(values))
    values, numbers = values[order], numbers[order]
    cut_test = len(values) - round(len(values) * test)
    cut = cut_test - round(cut_test * validation)
    if not 0 < cut < cut_test < len(values):
        raise DataError(
            f"data.validation={validation} and data.test={test} leave a split of {len(values)} samples empty"
        )
    if scale is None:
        scale = _scale(path, values[:cut])
    train, held_out, last = (
        LabelledLatents(values[a:b], numbers[a:b], classes, scale)
        for a, b in ((0, cut), (cut, cut_test), (cut_test, len(values)))
    )
    shape = {"image": tuple(values.shape[1:]), "classes": classes, "latent_scale": scale}
    # without the scale: the last bits of a standard deviation are the machine's, not the data's
    content = samples_hash((split.latents, split.labels) for split in (train, held_out, last))
    return DataSet(train, held_out, last, shape, content)


def _check_values(path: str, values: Tensor) -> None:
    if values.ndim != 4 or not values.is_floating_point() or not values.numel():
        raise DataError(
            f"{path} holds {values.dtype} of shape {tuple(values.shape)}: latents are floats of shape (n, C, H, W), "
            "and none of these is 0"
        )
    for start in range(0, len(values), PIECE):
        # as they are trained on: what float64 holds may be infinite there
        piece = values[start : start + PIECE].float()
        wrong = ~piece.isfinite()
        if wrong.any():
            sample, *place = wrong.nonzero()[0].tolist()
            value = piece[sample][tuple(place)].item()
            raise DataError(
                f"{path}: latent {start + sample} (the first is 0) is {value} in float32 at {tuple(place)} of (C, H, "
                "W): leave it out, or encode it again"
            )


def _scale(path: str, train: Tensor) -> float:
    smallest, largest = train.double().aminmax()
    scale = TARGET_STD / float(train.double().std()) if smallest < largest else math.inf
    if not scale <= torch.finfo(torch.float32).max:
        raise DataError(
            f"{path}: the latents of the training split are all {float(smallest):g}, which no scale brings to a "
            f"standard deviation of {TARGET_STD}: check the encoder that wrote them, or set data.scale"
        )
    return scale


def _read(path: Path, labels: str | None, read: ReadTensors) -> tuple[Tensor, Tensor]:
    tensors = read(path)
    if path.suffix == ".npy":
        if labels is None:
            raise DataError(f"{path} holds latents alone: give a .npy file of the classes as data.labels")
        if Path(labels).suffix != ".npy":
            raise DataError(f"data.labels={labels} must be a .npy file, as {path} is one")
        [values], [numbers] = tensors.values(), read(Path(labels)).values()
    elif labels is not None:
        raise DataError(
            f"data.labels={labels} is for latents in a .npy file: leave it out, {path} must hold its labels"
        )
    elif {"latent", "label"} <= set(tensors):
        values, numbers = tensors["latent"], tensors["label"]
    else:
        raise DataError(f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}; needed are latent and label")
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        raise DataError(
            f"{labels or path}: labels are whole numbers of shape (n,), not {numbers.dtype} of {tuple(numbers.shape)}: "
            "save the classes' numbers, from 0, as int64"
        )
    return values, numbers.long()
