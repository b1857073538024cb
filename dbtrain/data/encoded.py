"""Latents and text embeddings that encoders wrote into safetensors files, read through memory maps.

What is trained on may be larger than the memory: a batch reads its own rows, wherever they lie.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.data.batching import send
from dbtrain.data.encoded_facts import Facts, PerChannel, facts_of, normalisation
from dbtrain.data.packed import cache_folder
from dbtrain.data.splits import DataSet, check_labels, mixed
from dbtrain.errors import DataError

MapTensors = Callable[[Path], dict[str, Tensor]]
"""Tensors of a file by name, not yet read; raises DataError."""


class EncodedSamples:
    """Rows of several files, normalised by channel when a batch is made.

    Args:
        files: tensors of each file by name: ``latent`` (n, C, ...), and ``label`` (n,), or ``text`` (n, L, D)
            and ``mask`` (n, L).
        rows: numbers of the samples over all files, in the order of this split.
        mean, std: (C,) of the latents as they lie in the files.
        scale: factor on what they are brought to.
    """

    def __init__(
        self, files: Sequence[Mapping[str, Tensor]], rows: Tensor, mean: Tensor, std: Tensor, scale: float
    ) -> None:
        self.files, self.rows, self.mean, self.std, self.scale = files, rows, mean, std, scale
        self.ends = torch.tensor([len(file["latent"]) for file in files]).cumsum(0)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """``image`` (n, C, ...) float32; ``label`` (n,), or ``text`` (n, L, D) float32 and ``mask`` (n, L),
        true where a token is."""
        rows = self.rows[indices.cpu()]
        found = {name: send(self._rows(name, rows), device) for name in self.files[0]}
        batch = {"image": self._normalised(found["latent"])}
        kinds = {"label": torch.int64, "text": torch.float32, "mask": torch.bool}
        return batch | {name: found[name].to(kind) for name, kind in kinds.items() if name in found}

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor over all files, in their order."""
        owners = torch.bucketize(rows, self.ends, right=True)
        like = self.files[0][name]
        found = like.new_empty(len(rows), *like.shape[1:])
        for number in owners.unique().tolist():  # type: ignore[no-untyped-call]
            at = (owners == number).nonzero()[:, 0]
            tensor = self.files[number][name]
            found[at] = tensor[rows[at] - (self.ends[number] - len(tensor))]
        return found

    def _normalised(self, latents: Tensor) -> Tensor:
        mean, std = (by_channel(part, latents).to(latents.device) for part in (self.mean, self.std))
        return (latents.float() - mean) / std * self.scale


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) in the shape (1, C, 1, ...) that goes with samples (n, C, ...)."""
    return values.reshape(1, -1, *(1 for _ in like.shape[2:]))


def as_encoded(samples: Tensor, shape: Mapping[str, Any]) -> Tensor:
    """Samples (N, C, ...) of a model in the scale of the latents that it was trained on; pixels as they are.

    Args:
        samples: as the model draws them.
        shape: what the data said, with `latent_scale`, and `latent_mean` and `latent_std` by channel, if any.
    """
    plain = samples / float(shape.get("latent_scale", 1.0))
    if "latent_std" not in shape:
        return plain
    mean, std = (torch.tensor(shape[name], device=samples.device) for name in ("latent_mean", "latent_std"))
    along = (1, -1, *(1 for _ in samples.shape[2:]))
    return plain * std.reshape(along) + mean.reshape(along)


def encoded(
    path: str,
    classes: int | None,
    mean: PerChannel,
    std: PerChannel,
    scale: float,
    validation: float,
    test: float,
    cache: str | None,
    read: MapTensors,
) -> DataSet:
    """Encoded samples from a folder of safetensors files, or from one file.

    Of a fixed permutation of all samples the last `test` share is the test set, `validation` that before it.

    Args:
        path: the folder, whose files count in the order of their names.
        classes: number of classes, of files with labels; None for files with text.
        mean, std: of the latents by channel, which are brought to 0 and 1; `measured` over all files; None
            leaves them as they are.
        scale: factor after that.
        cache: folder where measured facts are kept.
        read: maps a file.

    Raises:
        DataError: a file is missing, damaged, does not hold what it should, or unlike the others.
    """
    paths = _paths(Path(path))
    files = [_wanted(file, read(file), classes) for file in paths]
    for file, tensors in zip(paths, files, strict=True):
        _check_alike(file, tensors, paths[0], files[0])
        if classes is not None:
            _check_labels(file, tensors, classes)
    facts = [facts_of(file, tensors, cache_folder(cache)) for file, tensors in zip(paths, files, strict=True)]
    centre, width, notes = normalisation(path, facts, mean, std)
    order = mixed(sum(len(tensors["latent"]) for tensors in files))
    cut_test = len(order) - round(len(order) * test)
    cut = cut_test - round(cut_test * validation)
    if not 0 < cut < cut_test < len(order):
        raise DataError(
            f"data.validation={validation} and data.test={test} leave a split of {len(order)} samples empty"
        )
    ends = ((0, cut), (cut, cut_test), (cut_test, len(order)))
    train, held_out, last = (EncodedSamples(files, order[a:b], centre, width, scale) for a, b in ends)
    notes = [f"{cut:,} training, {cut_test - cut:,} validation, {len(order) - cut_test:,} test samples", *notes]
    shape, content = _shape(files[0], classes, centre, width, scale), _content(facts, validation, test)
    return DataSet(train, held_out, last, shape, content, notes=tuple(notes))


def _paths(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        if not found:
            raise DataError(f"{path} has no .safetensors file: give the folder that dbtrain encode wrote")
        return found
    if not path.is_file():
        raise DataError(f"data.path={path} is neither a folder of safetensors files nor such a file: check the path")
    return [path]


def _wanted(file: Path, tensors: Mapping[str, Tensor], classes: int | None) -> dict[str, Tensor]:
    """What is trained on of a file's tensors: latents, and labels if there are classes, or else text."""
    names = ("latent", "label") if classes is not None else ("latent", "text", "mask")
    missing = [name for name in names if name not in tensors]
    if missing:
        how = "leave data.classes out for latents with text" if classes is not None else "set data.classes for labels"
        raise DataError(
            f"{file} holds {', '.join(sorted(tensors)) or 'nothing'}, and needed are {', '.join(names)}: {how}, or "
            "encode it again"
        )
    _check_shapes(file, tensors, names)
    return {name: tensors[name] for name in names}


def _check_shapes(file: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    latent = tensors["latent"]
    wanted = {"latent": ((4, 5), True), "label": ((1,), False), "text": ((3,), True), "mask": ((2,), False)}
    for name in names:
        tensor, (dims, floats) = tensors[name], wanted[name]
        if tensor.ndim not in dims or tensor.is_floating_point() != floats or not tensor.numel():
            kind = "floats" if floats else "whole numbers"
            raise DataError(
                f"{file}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and should be {kind} of "
                f"{' or '.join(map(str, dims))} dimensions, none of them 0: encode it again"
            )
        if len(tensor) != len(latent):
            raise DataError(f"{file} has {len(latent)} latents and {len(tensor)} of {name}: encode it again")
    if "mask" in names and tensors["mask"].shape != tensors["text"].shape[:2]:
        raise DataError(
            f"{file}: mask has the shape {tuple(tensors['mask'].shape)}, and text {tuple(tensors['text'].shape)}: a "
            "mask says of each token whether it is there"
        )


def _check_alike(file: Path, tensors: Mapping[str, Tensor], first: Path, like: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        kinds = [(str(part.dtype), tuple(part.shape[1:])) for part in (tensor, like[name])]
        if kinds[0] != kinds[1]:
            raise DataError(
                f"{file}: {name} is {kinds[0][0]} of {kinds[0][1]} a sample, and in {first} {kinds[1][0]} of "
                f"{kinds[1][1]}: keep files of one kind in a folder"
            )


def _check_labels(file: Path, tensors: Mapping[str, Tensor], classes: int) -> None:
    try:
        check_labels(len(tensors["latent"]), tensors["label"].long(), classes)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _shape(
    like: Mapping[str, Tensor], classes: int | None, mean: Tensor, std: Tensor, scale: float
) -> dict[str, object]:
    shape: dict[str, object] = {"image": tuple(like["latent"].shape[1:]), "latent_scale": scale}
    shape |= {"latent_mean": tuple(mean.tolist()), "latent_std": tuple(std.tolist())}
    return shape | ({"text": tuple(like["text"].shape[1:])} if classes is None else {"classes": classes})


def _content(facts: Sequence[Facts], validation: float, test: float) -> str:
    parts = json.dumps([[part.content for part in facts], validation, test])
    return hashlib.sha256(parts.encode()).hexdigest()
