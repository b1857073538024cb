import gzip
import struct

import numpy as np
import pytest
import torch

from dbtrain.data.images import read_idx
from dbtrain.data.registry import load
from dbtrain.errors import DataError

CPU = torch.device("cpu")
PIXELS = np.arange(5 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4)


def idx(array, kind=8, zero=0, dims=None):
    shape = dims or array.shape
    return struct.pack(f">HBB{len(shape)}I", zero, kind, len(shape), *shape) + array.tobytes()


def refused(path, *words):
    with pytest.raises(DataError) as caught:
        read_idx(path, 3)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_an_idx_file_is_read_exactly(tmp_path, packed):
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx(PIXELS)) if packed else idx(PIXELS))
    assert torch.equal(read_idx(path, 3), torch.from_numpy(PIXELS))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "damaged"),
        (b"\0\0", "damaged"),
        (idx(PIXELS)[:10], "damaged"),
        (idx(PIXELS)[:-1], "cut short"),
        (idx(PIXELS) + b"x", "cut short"),
        (idx(PIXELS, zero=1), "is no IDX file"),
        (idx(PIXELS, kind=0x0D), "is no IDX file"),
        (idx(PIXELS[0]), "is no IDX file of 3-dimensional"),
        (b"<html><body>404 Not Found</body></html>", "IDX"),
        (b"\0\0\x08\xff" + bytes(20), "damaged"),
    ],
    ids=["empty", "two bytes", "header cut", "cut", "longer", "magic", "floats", "labels", "web page", "255 dims"],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, data, word):
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path / "a", word)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "trailer"])
def test_a_damaged_gzip_file_is_refused_in_one_line(tmp_path, damage):
    good = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 255, (50, 3, 4), dtype=np.uint8))))
    if damage == "cut":
        good = good[: len(good) // 2]
    if damage == "flipped":
        good[len(good) // 2] ^= 0xFF
        good[len(good) // 2 + 1] ^= 0xFF
    if damage == "not gzip":
        good = bytearray(idx(PIXELS))
    if damage == "trailer":
        good[-6] ^= 0xFF  # the checksum
    path = tmp_path / "a.gz"
    path.write_bytes(good)
    refused(path, "damaged")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "nothing", "No such file")


def write_folder(folder, train=20, test=6, labels=None):
    for part, count in (("train", train), ("t10k", test)):
        pixels = np.full((count, 4, 4), 7, np.uint8)
        numbers = np.arange(count if labels is None else labels, dtype=np.uint8) % 3
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(numbers)))


@pytest.mark.parametrize("source", ["idx", "fashion_mnist"])
def test_a_folder_of_idx_files_is_three_splits(tmp_path, source):
    write_folder(tmp_path)
    classes = {"classes": 3} if source == "idx" else {}
    data = load(source, {"path": str(tmp_path), "validation": 0.25, **classes})
    assert [len(split) for split in (data.train, data.validation, data.test)] == [15, 5, 6]
    assert data.shape == {"image": (1, 4, 4), "classes": 3 if classes else 10}
    assert data.test.batch(torch.arange(6), CPU)["label"].tolist() == [0, 1, 2, 0, 1, 2]


def test_the_content_is_that_of_the_pixels_and_labels_of_every_split(tmp_path):
    def content():
        return load("idx", {"path": str(tmp_path), "classes": 3, "validation": 0.25}).content

    write_folder(tmp_path)
    found, images = [content()], tmp_path / "t10k-images-idx3-ubyte"
    labels, plain = tmp_path / "train-labels-idx1-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    plain.write_bytes(gzip.decompress(labels.read_bytes()))
    labels.unlink()
    assert content() == found[0]  # gzip is no part of it
    images.write_bytes(images.read_bytes()[:-1] + b"\x08")
    found.append(content())
    plain.write_bytes(plain.read_bytes()[:-1] + b"\x00")
    found.append(content())
    assert len(set(found)) == 3


def test_a_folder_that_lacks_a_file_or_does_not_match_is_refused(tmp_path):
    with pytest.raises(DataError, match="no train-images-idx3-ubyte or .*gz in .*data.path"):
        load("idx", {"path": str(tmp_path), "classes": 3, "validation": 0.25})
    write_folder(tmp_path, labels=4)
    with pytest.raises(DataError, match=f"{tmp_path}, files of train: 20 images and 4 labels"):
        load("idx", {"path": str(tmp_path), "classes": 3, "validation": 0.25})
    write_folder(tmp_path)
    with pytest.raises(DataError, match="label 2 of sample 2 is out of range"):
        load("idx", {"path": str(tmp_path), "classes": 2, "validation": 0.25})


def test_digits_load_and_split_without_a_sample_lost():
    data = load("digits", {"validation": 0.1})
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sizes == [1294, 144, 359] and sum(sizes) == 1797
    assert data.shape == {"image": (1, 8, 8), "classes": 10}
    batch = data.train.batch(torch.arange(1294), CPU)
    assert (float(batch["image"].min()), float(batch["image"].max())) == (-1.0, 1.0)
    assert batch["label"].unique().tolist() == list(range(10))
    again = load("digits", {"validation": 0.1}).train.batch(torch.arange(1294), CPU)
    assert torch.equal(batch["image"], again["image"]) and torch.equal(batch["label"], again["label"])


def test_classes_of_idx_files_follow_from_the_training_labels(tmp_path):
    write_folder(tmp_path)
    data = load("idx", {"path": str(tmp_path), "classes": None, "validation": 0.25})
    assert data.shape["classes"] == 3 and data.class_names == ("0", "1", "2")
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(6, 7, np.uint8))))
    with pytest.raises(DataError, match="files of t10k: label 7 of sample 0 is out of range: 3 classes"):
        load("idx", {"path": str(tmp_path), "classes": None, "validation": 0.25})
