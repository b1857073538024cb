"""What is measured of files of encoded samples: whether they are finite, their hash, mean and deviation.

Each file is read once for it; what was found is kept in the user's cache, as long as its place, size and time
stay.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dbtrain.errors import DataError
from dbtrain.method.content import content_hash

PerChannel = Sequence[float] | Literal["measured"] | None
"""Numbers by channel; what is measured; or what changes nothing."""

PIECE = 512
"""Samples that are checked and measured at once."""
DIGITS = 6
"""Significant digits of a measured number: the last bits are the machine's, not the data's."""
FAR = 2.0
"""Deviations from 1 by more than this factor, and means of more than 1, are warned of."""


@dataclass(frozen=True)
class Facts:
    """What is measured of a file once, and kept beside the user's other caches."""

    content: str
    """Hash of its tensors."""
    sums: tuple[float, ...]
    """Sum of the latents in each channel."""
    squares: tuple[float, ...]
    count: int
    """Numbers that a channel has in it."""


def facts_of(file: Path, tensors: Mapping[str, Tensor], folder: Path) -> Facts:
    """Hash and sums of a file.

    Raises:
        DataError: a number in it is not finite, or the folder for what was measured cannot be written.
    """
    stat = file.stat()
    place = json.dumps([str(file.absolute()), stat.st_size, stat.st_mtime_ns, sorted(tensors)])
    kept = folder / f"encoded-{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(kept.read_text())
        return Facts(known["content"], tuple(known["sums"]), tuple(known["squares"]), known["count"])
    except (OSError, ValueError, KeyError, TypeError):
        facts = _measured(file, tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = kept.with_name(f"{kept.name}.{os.getpid()}")
        draft.write_text(json.dumps(asdict(facts)))
        draft.replace(kept)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): set data.cache to another folder") from error
    return facts


def _measured(file: Path, tensors: Mapping[str, Tensor]) -> Facts:
    latent = tensors["latent"]
    sums = torch.zeros(latent.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for name in ("latent", "text"):
        for start in range(0, len(latent) if name in tensors else 0, PIECE):
            piece = tensors[name][start : start + PIECE].float()
            _check_finite(file, name, piece, start)
            if name == "latent":
                flat = piece.double().transpose(0, 1).flatten(1)
                sums, squares = sums + flat.sum(dim=1), squares + flat.square().sum(dim=1)
    count = latent.numel() // latent.shape[1]
    return Facts(content_hash(tensors), tuple(sums.tolist()), tuple(squares.tolist()), count)


def _check_finite(file: Path, name: str, piece: Tensor, start: int) -> None:
    wrong = ~piece.isfinite()
    if wrong.any():
        sample, *place = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{file}: {name} {start + sample} (the first is 0) is {piece[sample][tuple(place)].item()} in float32 at "
            f"{tuple(place)}: leave it out, or encode it again"
        )


def normalisation(
    path: str, facts: Sequence[Facts], mean: PerChannel, std: PerChannel
) -> tuple[Tensor, Tensor, list[str]]:
    """Mean and deviation (C,) float32 that are taken, and what people should be told of them.

    Raises:
        DataError: there are not as many numbers as channels, or a channel does not vary.
    """
    count = sum(part.count for part in facts)
    sums, squares = (
        torch.tensor([getattr(part, name) for part in facts], dtype=torch.float64).sum(0)
        for name in ("sums", "squares")
    )
    centre = sums / count
    width = (squares / count - centre.square()).clamp_min(0).sqrt()
    taken = [_taken(path, name, given, own) for name, given, own in (("mean", mean, centre), ("std", std, width))]
    still = (taken[1] <= 1e-6 * taken[0].abs().clamp_min(1e-6)).nonzero()[:, 0].tolist()
    if still:
        raise DataError(
            f"{path}: channel {still[0]} of the latents has a deviation of {float(taken[1][still[0]]):g}, which cannot "
            "be brought to 1: check the encoder, or set data.std"
        )
    left = (centre - taken[0]) / taken[1], width / taken[1]
    far = ((left[0].abs() > 1) | (left[1] > FAR) | (left[1] < 1 / FAR)).nonzero()[:, 0].tolist()
    numbers = [f"{c} (mean {float(left[0][c]):.3g}, deviation {float(left[1][c]):.3g})" for c in far]
    notes = [
        f"warning: after data.mean and data.std these channels are far from unit scale: {', '.join(numbers)}; "
        "data.mean=measured data.std=measured brings them there"
    ] if far else []  # fmt: skip
    return taken[0].float(), taken[1].float(), notes


def _taken(path: str, name: str, given: PerChannel, own: Tensor) -> Tensor:
    """(C,) float64: what is given, what was measured, or what leaves the latents as they are."""
    if given == "measured":
        return torch.tensor([float(f"{value:.{DIGITS}g}") for value in own.tolist()], dtype=torch.float64)
    if given is None:
        return torch.full_like(own, 1.0 if name == "std" else 0.0)
    if len(given) != len(own):
        raise DataError(f"data.{name} has {len(given)} numbers, and the latents of {path} have {len(own)} channels")
    return torch.tensor(given, dtype=torch.float64)
