"""Labelled images of fixed formats: scikit-learn's digits, and IDX files (MNIST and its kin)."""

import gzip
import math
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dbtrain.data.content import samples_hash
from dbtrain.data.pictures import hugging_face
from dbtrain.data.splits import DataSet, LabelledImages, hold_out
from dbtrain.errors import DataError

IDX_UINT8 = 0x08
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""
HUB_FASHION_MNIST = "zalando-datasets/fashion_mnist"
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
"""Names of its classes, as its authors give them."""


def digits(validation: float, test: float = 0.2) -> DataSet:
    """Scikit-learn's 1,797 handwritten digits, 8x8, in their published order;
    the last `test` share is the test set."""
    rows = torch.from_numpy(np.loadtxt(_digits_file(), delimiter=",", dtype=np.uint8))
    images, labels = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].long()
    whole = LabelledImages(images, labels, 10, scale=16.0)
    rest, test_split = hold_out(whole, test)
    return _data_set(rest, test_split, validation)


def _digits_file() -> Path:
    """Scikit-learn's own file. Importing scikit-learn to read it would take every worker two seconds."""
    spec = find_spec("sklearn")  # finds it without importing it
    if spec is None or spec.origin is None:
        raise DataError("data.source=digits comes with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def fashion_mnist(path: str | None, validation: float) -> DataSet:
    """Fashion-MNIST from a folder of IDX files, from Debian's package, or else from the Hugging Face hub."""
    if path is None and not DEBIAN_FASHION_MNIST.is_dir():
        # published well mixed: its order is kept, so that the splits are those of the IDX files
        return hugging_face(HUB_FASHION_MNIST, classes=10, validation=validation, mix=False)
    return idx_folder(path or str(DEBIAN_FASHION_MNIST), 10, validation, FASHION)


def idx_folder(path: str, classes: int | None, validation: float, names: tuple[str, ...] = ()) -> DataSet:
    """A folder with the four files of MNIST, gzipped or not;
    the last `validation` share of the training file is kept.

    Without `classes` the greatest label of the training file is that of the last class.

    Raises:
        DataError: a file is missing, damaged, or does not fit its partner.
    """
    folder = Path(path)
    parts = ("train", "t10k")
    images = {part: read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3)[:, None] for part in parts}
    labels = {part: read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), 1).long() for part in parts}
    count = classes or 1 + max(labels["train"].tolist(), default=0)
    train, test = (_labelled(images[part], labels[part], count, folder, part) for part in parts)
    return _data_set(train, test, validation, names)


def _labelled(images: Tensor, labels: Tensor, classes: int, folder: Path, part: str) -> LabelledImages:
    try:
        return LabelledImages(images, labels, classes)
    except DataError as error:
        raise DataError(f"{folder}, files of {part}: {error}") from error


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"no {name} or {name}.gz in {folder}: give the folder of the IDX files as data.path")


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Raises:
        DataError: the file is cut short, corrupt, or of another kind.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, count = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{count}I", data, 4)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise DataError(f"{path} is damaged or no IDX file ({error}): fetch it again") from error
    except Exception as error:  # zlib.error derives from Exception directly
        raise DataError(f"{path} is damaged ({error}): fetch it again") from error
    if zero != 0 or kind != IDX_UINT8 or count != dims:
        raise DataError(f"{path} is no IDX file of {dims}-dimensional unsigned bytes (its header is {data[:4].hex()})")
    body = data[4 + 4 * count :]
    if len(body) != math.prod(shape):
        raise DataError(f"{path} is cut short: its header says {shape}, it holds {len(body)} bytes; fetch it again")
    return torch.from_numpy(np.frombuffer(body, np.uint8).reshape(shape).copy())


def _data_set(rest: LabelledImages, test: LabelledImages, validation: float, names: tuple[str, ...] = ()) -> DataSet:
    train, held_out = hold_out(rest, validation)
    shape = {"image": tuple(train.images.shape[1:]), "classes": train.classes}
    # the pixels, not the files: gzipped or not, it is the same data
    content = samples_hash((split.images, split.labels) for split in (train, held_out, test))
    return DataSet(train, held_out, test, shape, content, names or tuple(map(str, range(train.classes))))
