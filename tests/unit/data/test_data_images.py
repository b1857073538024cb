import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.data.images import _pixels, read_idx
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
    with pytest.raises(DataError, match="20 images and 4 labels"):
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


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    datasets.disable_progress_bars()
    return tmp_path


def pictures(folder, test=2):
    for split, count in (("train", 8), ("test", test)):
        for label in ("cat", "dog"):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count // 2):
                Image.new("RGB", (6, 4), (200 if label == "dog" else 10, 0, 0)).save(place / f"{i}.png")


def load_hf(path, **changes):
    return load(
        "hf", {"path": str(path), "image": "image", "label": "label", "classes": 2, "validation": 0.25, **changes}
    )


def test_a_folder_of_pictures_is_read_through_datasets(offline):
    pictures(offline / "pets")
    data = load_hf(offline / "pets", validation=0.5)
    # the folder is sorted by class
    assert [len(s.batch(torch.arange(4), CPU)["label"].unique()) for s in (data.train, data.validation)] == [2, 2]
    data = load_hf(offline / "pets")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 2, 2]
    assert data.shape == {"image": (3, 4, 6), "classes": 2}
    batch = data.test.batch(torch.arange(2), CPU)
    red = (batch["image"][:, 0, 0, 0] + 1) * 127.5
    assert batch["label"].sort().values.tolist() == [0, 1]
    assert red.tolist() == pytest.approx([200.0 if label else 10.0 for label in batch["label"].tolist()], abs=0.01)
    assert (batch["image"][:, 1:] == -1).all()
    with pytest.raises(DataError, match="columns 'picture' and 'label'"):
        load_hf(offline / "pets", image="picture")
    with pytest.raises(DataError, match="label 1 of sample .* 1 classes"):
        load_hf(offline / "pets", classes=1)


def test_the_test_split_is_mixed_as_the_training_split_is(offline):
    pictures(offline / "pets", test=20)
    labels = load_hf(offline / "pets").test.batch(torch.arange(20), CPU)["label"]
    assert labels.bincount().tolist() == [10, 10] and all(len(part.unique()) == 2 for part in labels.split(10))


def of_mode(folder, mode, value):
    pictures(folder)
    for file in folder.rglob("*.png"):
        Image.new(mode, (6, 4), value).save(file)


@pytest.mark.parametrize(
    ("mode", "value", "found"),
    [("I;16", 300, r"mode I;16 \(uint16\)"), ("I;16", 3, "mode I;16"), ("P", 3, r"mode P \(uint8\)")],
    ids=["16 bits", "16 bits, all of them small", "palette"],
)
def test_pictures_that_are_not_of_8_bits_are_refused(offline, mode, value, found):
    of_mode(offline / "pets", mode, value)
    with pytest.raises(DataError, match=rf"picture 0 of train has pixels of PIL's {found}.*convert them .*L or RGB"):
        load_hf(offline / "pets")


def test_of_pictures_of_one_bit_black_and_white_are_made(offline):
    of_mode(offline / "pets", "1", 1)
    for file in (offline / "pets").rglob("0.png"):
        Image.new("1", (6, 4), 0).save(file)
    data = load_hf(offline / "pets")
    images = data.train.batch(torch.arange(6), CPU)["image"]
    assert data.shape["image"] == (1, 4, 6) and images.unique().tolist() == [-1, 1]


@pytest.mark.parametrize(("value", "found"), [(0.5, "float64"), (256, "int64"), (-1, "int64")])
def test_numbers_that_8_bits_do_not_hold_are_refused(value, found):
    assert _pixels([[0, 255]], "picture").dtype == np.uint8
    with pytest.raises(DataError, match=f"picture 7 of test has values of {found}"):
        _pixels([[0, value]], "picture 7 of test")


def test_a_path_that_is_no_data_set_is_refused_in_one_line(offline):
    with pytest.raises(DataError) as caught:
        load_hf(offline / "nowhere")
    assert "\n" not in str(caught.value) and "nowhere" in str(caught.value)
