"""Labelled images: scikit-learn's digits, IDX files (MNIST and its kin), and anything Hugging Face datasets reads."""

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbtrain.data.content import samples_hash
from dbtrain.data.splits import DataSet, LabelledImages, hold_out
from dbtrain.errors import DataError, first_line

IDX_UINT8 = 0x08
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""
HUB_FASHION_MNIST = "zalando-datasets/fashion_mnist"


def digits(validation: float, test: float = 0.2) -> DataSet:
    """Scikit-learn's 1,797 handwritten digits, 8x8, in their published order; the last `test` share is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    whole = LabelledImages(images, torch.from_numpy(bunch.target).long(), 10, scale=16.0)
    rest, test_split = hold_out(whole, test)
    return _data_set(rest, test_split, validation)


def fashion_mnist(path: str | None, validation: float) -> DataSet:
    """Fashion-MNIST from a folder of IDX files, from Debian's package, or else from the Hugging Face hub."""
    if path is None and not DEBIAN_FASHION_MNIST.is_dir():
        # published well mixed: its order is kept, so that the splits are those of the IDX files
        return hugging_face(HUB_FASHION_MNIST, "image", "label", 10, validation, mix=False)
    return idx_folder(path or str(DEBIAN_FASHION_MNIST), 10, validation)


def idx_folder(path: str, classes: int, validation: float) -> DataSet:
    """A folder with the four files of MNIST, gzipped or not; the last `validation` share of the training file is kept.

    Raises:
        DataError: a file is missing, damaged, or does not fit its partner.
    """
    folder = Path(path)
    splits = [
        LabelledImages(
            read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3)[:, None],
            read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), 1).long(),
            classes,
        )
        for part in ("train", "t10k")
    ]
    return _data_set(splits[0], splits[1], validation)


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


def hugging_face(path: str, image: str, label: str, classes: int, validation: float, mix: bool = True) -> DataSet:
    """A data set of the hub or a local folder that `datasets` reads, with splits ``train`` and ``test``.

    A folder of pictures is sorted by class, so both are put into a fixed random order, unless `mix` is false; then the
    validation share of ``train`` is cut.

    Raises:
        DataError: it cannot be loaded, lacks a split or column, or its pictures are not of 8 bits.
    """
    try:
        import datasets

        loaded: Any = datasets.load_dataset(path)
        parts = [_from_hugging_face(loaded[name], image, label, classes) for name in ("train", "test")]
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"data.source=hf needs the extra packages of dbtrain[hub] ({error}): install them") from error
    except Exception as error:
        raise DataError(
            f"data.path={path!r} cannot be read as a Hugging Face data set with splits train and test and columns "
            f"{image!r} and {label!r}: {first_line(error)}"
        ) from error
    train, test = (part.mixed() if mix else part for part in parts)
    return _data_set(train, test, validation)


def _from_hugging_face(split: Any, image: str, label: str, classes: int) -> LabelledImages:
    arrays = np.stack([_pixels(picture, f"picture {i} of {split.split}") for i, picture in enumerate(split[image])])
    channels_last = arrays[..., None] if arrays.ndim == 3 else arrays
    images = torch.from_numpy(channels_last).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor(split[label], dtype=torch.int64), classes)


def _pixels(picture: Any, name: str) -> NDArray[np.uint8]:
    """Bytes (H, W) or (H, W, channels) of a picture of PIL, or of rows of whole numbers."""
    mode = getattr(picture, "mode", None)
    # of one bit a pixel is true or false, which PIL makes black and white of
    array = np.asarray(picture.convert("L") if mode == "1" else picture)
    if mode is None and array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= 255:
        array = array.astype(np.uint8)
    # the bytes of a palette (P) are numbers of colours
    if array.dtype != np.uint8 or mode in ("P", "PA"):
        kind = f"values of {array.dtype}" if mode is None else f"pixels of PIL's mode {mode} ({array.dtype})"
        raise DataError(f"{name} has {kind}, and images are kept in 8 bits: convert them to PIL's mode L or RGB")
    return array


def _data_set(rest: LabelledImages, test: LabelledImages, validation: float) -> DataSet:
    train, held_out = hold_out(rest, validation)
    shape = {"image": tuple(train.images.shape[1:]), "classes": train.classes}
    # the pixels, not the files: the hub's copy of a data set is the same data
    content = samples_hash((split.images, split.labels) for split in (train, held_out, test))
    return DataSet(train, held_out, test, shape, content)
