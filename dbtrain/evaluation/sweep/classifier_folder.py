"""Hidden states of a classifier of images in a Hugging Face folder, of pictures that lie on this machine."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dbtrain.data.labels import Labels, number_classes
from dbtrain.data.picture_files import Part, find_pictures, split_named
from dbtrain.data.pixels import Want, pixels
from dbtrain.errors import ConfigError, first_line
from dbtrain.evaluation.sweep.concepts import ConceptSet
from dbtrain.evaluation.sweep.geometry import Floats
from dbtrain.evaluation.sweep.hidden import BATCH, IMAGES, States, class_set, of_classes

READ = "ViTForImageClassification"
SCALES = "preprocessor_config.json"
"""File in which transformers keeps how pixels become numbers."""


class SweptClassifier:
    """A ViTForImageClassification of `transformers`, from a folder: no network, no pickle, no code of its
    own.

    The states are those of the class token, from which the answer is read. Layer 0, the embedding, is left
    out: there the token is the same for all pictures.

    Args:
        folder: folder with config.json and safetensors weights.
        pictures: folder of class folders, or Parquet, as of `data.source=images`; of splits the test split.

    Raises:
        ConfigError: transformers is not installed, or the folder holds no such model.
        DataError: there are no such pictures.
    """

    weights = ""

    def __init__(self, folder: Path, pictures: str) -> None:
        try:
            from transformers import ViTForImageClassification
        except ModuleNotFoundError:
            raise ConfigError(
                f"{folder} is a Hugging Face folder, which needs transformers: pip install transformers"
            ) from None
        try:
            how: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
            read, told = ViTForImageClassification.from_pretrained(folder, **how)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"{folder} holds no {READ} that transformers reads ({first_line(error)}): it needs config.json and "
                "safetensors weights"
            ) from None
        if missing := sorted(told["missing_keys"]):
            raise ConfigError(f"{folder} lacks {len(missing)} tensors of its {READ}, first {missing[0]}: fetch it anew")
        self.model = read.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.name = folder.resolve().name
        self.layers = list(range(1, int(self.model.config.num_hidden_layers) + 1))
        self.want, (self.factor, self.shift) = _want(self.model.config, folder), _scale(folder)
        found = find_pictures(pictures, "image", "label")
        self.part = _held_out(found.parts)
        labels = Labels(self.part.labels, self.part.where)
        numbers, self.names = number_classes({"train": labels}, found.classes, None)
        self.numbers = numbers["train"].numpy()

    def classes(self) -> ConceptSet:
        """The classes of the pictures as a concept set without an order.

        Raises:
            ConfigError: there are too few, or more than the model has.
        """
        known = int(self.model.config.num_labels)
        if len(self.names) > known:
            raise ConfigError(
                f"--pictures has {len(self.names)} classes, and {self.name} was made for {known}: give pictures of the "
                "classes that it knows, or say with --concepts which of these are to be compared"
            )
        return class_set(self.names, f"the folder of pictures for {self.name}")

    def states(self, concepts: ConceptSet) -> States:
        """Read pictures of the classes that a set names."""
        return of_classes(concepts, self.names, lambda number: self._read(np.flatnonzero(self.numbers == number)))

    def first_tokens(self, concepts: ConceptSet) -> list[int]:
        """Numbers of the model's own classes of these names.

        Raises:
            ConfigError: it has no class of that name.
        """
        known: Mapping[int, str] = self.model.config.id2label
        places = {name: int(number) for number, name in known.items()}
        if lacking := [label for label in concepts.labels if label not in places]:
            raise ConfigError(
                f"{self.name} calls none of its classes {lacking[0]!r} (id2label in its config.json): use "
                "--behaviour vocabulary, which needs no names"
            )
        return [places[label] for label in concepts.labels]

    @torch.no_grad()
    def _read(self, numbers: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(states (n, layers, width), answers (n, classes)) of the first pictures among these."""
        hidden, chances = [], []
        for batch in torch.split(self._pictures(numbers[:IMAGES]), BATCH):
            given = self.model(pixel_values=batch.to(self.model.device), output_hidden_states=True)
            hidden.append(torch.stack([layer[:, 0] for layer in given.hidden_states[1:]], dim=1))
            chances.append(given.logits.float().softmax(dim=-1))
        return torch.cat(hidden).double().cpu().numpy(), torch.cat(chances).double().cpu().numpy()

    def _pictures(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """Pictures (n, C, H, W) float32, scaled as the model wants them."""
        values = self._values
        read = np.stack([pixels(values[n], self.part.where(n), self.want) for n in numbers.tolist()])
        return torch.from_numpy(read).float() * self.factor + self.shift

    @cached_property
    def _values(self) -> list[Any]:
        """The pictures as they lie there: paths, or the bytes of their files."""
        return list(self.part.values())


def _held_out(parts: Mapping[str, Part]) -> Part:
    """The test split if there is one, else the validation split, else what there is."""
    by_split = {split_named(name): part for name, part in parts.items()}
    return next(by_split[split] for split in ("test", "validation", "train") if split in by_split)


def _want(config: Any, folder: Path) -> Want:
    """Size and channels of the model's pictures; each side is scaled for itself, as transformers does."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if config.num_channels not in (1, 3):
        raise ConfigError(f"{folder} takes pictures of {config.num_channels} channels, and pictures have 1 or 3")
    return Want((int(height), int(width)), "squash", config.num_channels)


def _scale(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, shift), each (channels or 1, 1, 1): a byte of a picture becomes byte * factor + shift.

    Without the file's word white is 1 and black -1, as ViTImageProcessor has it.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / SCALES
    try:
        said = json.loads(file.read_text("utf-8")) if file.exists() else {}
        rescale = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        normal = said.get("do_normalize", True)
        mean, std = (
            (said.get(f"image_{key}", 0.5) if normal else plain) for key, plain in (("mean", 0.0), ("std", 1.0))
        )
        means, stds = (torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (mean, std))
        return rescale / stds, -means / stds
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({first_line(error)}): fix it, or remove it") from None
