"""Class folders, Parquet files and the hub's data sets of pictures become three splits, or are refused by name."""

import os
import shutil
import warnings

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from dbtrain.data import decoded, splits
from dbtrain.data.registry import load
from dbtrain.errors import DataError
from tests.unit.data.pictures import SIZE, class_folders, content, picture

CPU = torch.device("cpu")
IMAGE = (3, SIZE[1], SIZE[0])


@pytest.fixture(autouse=True)
def kept(tmp_path_factory, monkeypatch):
    """The user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def images(path, **changes):
    return load("images", {"path": str(path), "validation": 0.25, **changes})


def refused(path, *words, **changes):
    with pytest.raises(DataError) as caught:
        images(path, **changes)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def counts(data):
    return [len(split) for split in (data.train, data.validation, data.test)]


def all_samples(data):
    parts = (data.train, data.validation, data.test)
    return [(bytes(split.images[i].numpy()), int(split.labels[i])) for split in parts for i in range(len(split))]


def expected(seeds, labels):
    return [
        (np.asarray(picture(s)).transpose(2, 0, 1).tobytes(), label) for s, label in zip(seeds, labels, strict=True)
    ]


# folders


def test_class_folders_without_splits_are_split_by_a_fixed_draw_and_nothing_is_lost(tmp_path):
    class_folders(tmp_path / "pets", {"dog": 20, "cat": 13})
    data = images(tmp_path / "pets", test=0.2)
    assert counts(data) == [20, 6, 7] and data.shape == {"image": IMAGE, "classes": 2}
    assert data.class_names == ("cat", "dog")
    # cat comes first, and its pictures were made last
    assert sorted(all_samples(data)) == sorted(expected([*range(20, 33), *range(20)], [0] * 13 + [1] * 20))
    assert all(len(split.labels.unique()) == 2 for split in (data.train, data.validation, data.test))
    assert all_samples(images(tmp_path / "pets", test=0.2)) == all_samples(data)
    assert data.notes == (
        "20 training, 6 validation, 7 test pictures of 37x53 (width x height) in 3 channel(s), 2 class(es): cat, dog",
        "the test split is the 20% of the training pictures that a draw with a fixed seed put last: 7 pictures",
        "the validation split is the 25% of the others that a draw with a fixed seed put last: 6 pictures",
    )


def test_splits_that_are_there_are_taken_under_their_usual_names(tmp_path):
    root = tmp_path / "pets"
    for split, first in (("Train", 0), ("val", 100), ("test", 200)):
        class_folders(root / split, {"cat": 4, "dog": 3}, first)
    data = images(root)
    assert counts(data) == [7, 7, 7] and len(data.notes) == 1
    assert sorted(all_samples(data)[7:14]) == sorted(expected(range(100, 107), [0] * 4 + [1] * 3))
    shutil.rmtree(root / "test")
    data = images(root, test=0.3)
    assert counts(data) == [5, 7, 2] and "the test split is the 30%" in data.notes[1]
    data = images(root, test_split="val")
    assert counts(data) == [5, 2, 7] and "the validation split is the 25%" in data.notes[1]
    refused(root, "data.test_split=tets", "Train, val", test_split="tets")


def test_a_class_that_the_training_split_lacks_is_refused(tmp_path):
    class_folders(tmp_path / "train", {"cat": 4, "dog": 4})
    class_folders(tmp_path / "test", {"cat": 4, "dogs": 4})
    refused(tmp_path, tmp_path / "test" / "dogs", "lacks")
    shutil.rmtree(tmp_path / "test" / "dogs")
    assert images(tmp_path).test.labels.tolist() == [0] * 4


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    class_folders(tmp_path, {str(n): 3 for n in range(12)})
    assert images(tmp_path).class_names == tuple(map(str, range(12)))


def test_hidden_and_foreign_files_are_no_pictures_and_linked_folders_are(tmp_path):
    root = class_folders(tmp_path / "pets", {"cat": 5, "dog": 4})
    class_folders(tmp_path / "elsewhere", {"more": 3}, 50)
    (root / "dog" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    class_folders(root, {".thumbnails": 2})
    for name in (".DS_Store", "._000.png", "Thumbs.db"):
        (root / "cat" / name).write_text("x")
    data = images(root)
    assert sum(counts(data)) == 12 and data.class_names == ("cat", "dog") and len(data.notes) == 3
    (root / "cat" / "labels.csv").write_text("x")
    assert images(root).notes[-1] == (
        f"1 file(s) in {root} are no pictures by their names and are left out: {root}/cat/labels.csv"
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "eel").mkdir(), ["class folder", "eel has no picture"]),
        (lambda root: (root / "loose.png").write_bytes(content()), ["loose.png lies in no folder of a class"]),
        (lambda root: class_folders(root, {"test": 2}), ["has the folder test beside cat", "another name"]),
        (lambda root: [(root / n).rename(root / m) for n, m in (("cat", "val"), ("dog", "test"))], ["no folder train"]),
        (lambda root: [shutil.rmtree(root / n) for n in ("cat", "dog")], ["neither folders of classes nor Parquet"]),
        (lambda root: shutil.rmtree(root), ["does not exist"]),
        (lambda root: [shutil.rmtree(root), root.write_text("x")], ["is a file, and not .parquet"]),
        (lambda root: (root / "cat" / "7.png").symlink_to("gone"), ["7.png cannot be read"]),
    ],
    ids=["empty class", "no class", "class like a split", "no train", "empty", "nothing", "a file", "dangling link"],
)
def test_a_folder_that_is_not_what_it_should_be_is_refused(tmp_path, spoil, words):
    root = class_folders(tmp_path / "pets", {"cat": 4, "dog": 4})
    spoil(root)
    refused(root, root, *words)


def test_a_wrong_picture_among_many_is_named(tmp_path, kept):
    root = class_folders(tmp_path / "pets", {"cat": 90, "dog": 90})
    wrong = root / "dog" / "041.png"
    wrong.write_bytes(content(7)[:900])
    refused(root, f"{wrong} cannot be read as a picture")
    wrong.write_bytes(content(7, size=(53, 37)))
    refused(root, f"{wrong} is 53x37, and {root}/cat/000.png is 37x53 (width x height)", "data.size", "pad or squash")
    wrong.write_bytes(content(7, mode="L"))
    refused(root, f"{wrong} has 1 channel(s), and {root}/cat/000.png has 3", "data.channels=1 or 3")
    assert images(root, channels=1).shape["image"] == (1, 53, 37)
    assert not list(kept.rglob(".pictures*")) and len(list(kept.rglob("*.uint8"))) == 1


@pytest.mark.parametrize("resize", [None, "crop", "pad", "squash"])
def test_mixed_sizes_are_brought_to_one(tmp_path, resize):
    class_folders(tmp_path, {"cat": 5})
    class_folders(tmp_path, {"dog": 5}, size=(101, 64), mode="L")
    refused(tmp_path, "dog/000.png has 1 channel(s)", "data.channels")
    refused(tmp_path, "dog/000.png is 101x64", "cat/000.png is 37x53", "data.size", channels=3)
    data = images(tmp_path, size=(20, 31), resize=resize, channels=3)
    assert data.shape["image"] == (3, 20, 31) and "31x20 (width x height)" in data.notes[0]


def test_another_shape_is_other_data(tmp_path):
    class_folders(tmp_path, {"cat": 5, "dog": 5})
    wants = [{}, {"size": (20, 20)}, {"size": (20, 20), "resize": "pad"}, {"channels": 1}, {"validation": 0.5}]
    assert len({images(tmp_path, **want).content for want in wants}) == len(wants)


def test_classes_that_are_said_must_be_those_of_the_data(tmp_path):
    class_folders(tmp_path, {"cat": 5, "dog": 5})
    assert images(tmp_path, classes=2).shape["classes"] == 2
    refused(tmp_path, "data.classes=3, and the data has 2: cat, dog", classes=3)


def test_too_few_pictures_for_a_split_are_refused(tmp_path):
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    refused(tmp_path, "data.test=0.1 leaves 2 of 2 samples for training")


# what is kept


def test_pictures_are_decoded_once_and_every_change_of_a_file_is_seen(tmp_path, monkeypatch, kept):
    root = class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    before, file = images(root), next(kept.rglob("*.uint8"))
    made = file.stat().st_mtime_ns
    assert images(root).content == before.content and file.stat().st_mtime_ns == made
    picture_file = root / "cat" / "002.png"
    times = picture_file.stat()
    picture_file.write_bytes(content(99)[: times.st_size].ljust(times.st_size, b"\0"))
    os.utime(picture_file, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and time
    assert images(root).content != before.content
    class_folders(root, {"eel": 2})
    assert images(root).class_names == ("cat", "dog", "eel")


@pytest.mark.parametrize("damage", ["flipped", "cut", "no record", "half a record"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage, kept):
    root = class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    before = all_samples(images(root))
    file = next(kept.rglob("*.uint8"))
    whole = bytearray(file.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 1
    file.write_bytes(whole[:-1] if damage == "cut" else whole)
    record = file.with_suffix(".json")
    if damage.endswith("record"):
        record.write_text(record.read_text()[:20] if damage.startswith("half") else "{}")
    assert all_samples(images(root)) == before and file.read_bytes() != b"" and len(file.read_bytes()) == len(whole)


def test_a_cache_of_others_is_read_and_one_that_cannot_be_written_is_refused(tmp_path):
    root = class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    cache = tmp_path / "shared"
    before = images(root, cache=str(cache))
    modes = {file.stat().st_mode & 0o777 for file in cache.iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}
    next(cache.glob("*.lock")).unlink()
    next(cache.glob("*.json")).with_suffix(".lock").mkdir()  # as root may write everywhere: a lock that cannot be had
    assert images(root, cache=str(cache)).content == before.content
    (tmp_path / "file").write_text("x")
    refused(root, f"cannot be kept in {tmp_path}/file", "set data.cache", cache=str(tmp_path / "file"))


def test_pictures_that_the_disk_cannot_hold_are_refused_with_an_estimate(tmp_path, monkeypatch, kept):
    root = class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(root, "10 pictures of 3x53x37 bytes take 0.00 GiB decoded", "data.cache", "smaller data.size")
    assert not list(kept.rglob("*.uint8"))


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path, kept):
    import socket

    root = class_folders(tmp_path / "pets", {"cat": 5, "dog": 5})
    images(root)
    file = next(kept.rglob("*.uint8"))
    left = [file.with_name(f".{file.name}.{host}.{pid}") for host, pid in ((socket.gethostname(), 2**22 + 1), ("b", 1))]
    for draft in left:
        draft.write_text("x")
    file.unlink()
    images(root)
    assert [draft.exists() for draft in left] == [False, True]


def test_many_images_stay_in_their_file_and_batches_are_the_same(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets", {"cat": 9, "dog": 9})
    indices = torch.tensor([3, 1, 1])
    near = images(tmp_path / "pets").train.batch(indices, CPU)
    monkeypatch.setattr(splits, "RESIDENT", 0)
    data = images(tmp_path / "pets")
    far = data.train.batch(indices, torch.device("meta"))
    assert far["image"].device.type == "meta" and data.train.images.device == CPU
    assert torch.equal(data.train.batch(indices, CPU)["image"], near["image"])


def test_a_file_of_pictures_larger_than_the_memory_is_mapped(tmp_path):
    count = (psutil.virtual_memory().total + psutil.swap_memory().total) // (32 * 32) + 2**20
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, count * 32 * 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = decoded._cut(file, (count, 1, 32, 32), {"train": ("train", torch.empty(count, dtype=torch.int8))})
    assert len(images["train"]) == count and not images["train"][-1].any()


# Parquet


def table(root, name, labels, first=0, features=None, **columns):
    """A Parquet file as the datasets library writes it, or, with another form of the pictures, by Arrow alone."""
    root.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": content(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    columns = {"image": pictures, "label": labels, **columns}
    if features is None:
        pyarrow.parquet.write_table(pa.table(columns), root / name, row_group_size=7)
    else:
        import datasets

        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=features)}
        datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet(root / name)
    return root / name


def test_a_parquet_file_of_the_datasets_library_is_read_with_its_names(tmp_path):
    file = table(tmp_path, "pets.parquet", [i % 3 for i in range(30)], features=["eel", "cat", "dog"])
    data = images(file)
    assert counts(data) == [20, 7, 3] and data.class_names == ("eel", "cat", "dog")
    assert sorted(all_samples(data)) == sorted(expected(range(30), [i % 3 for i in range(30)]))


def test_a_folder_of_parquet_files_has_splits_by_name_or_none(tmp_path):
    root = tmp_path / "pets" / "data"
    for i in range(2):
        table(root, f"train-0000{i}-of-00002.parquet", ["cat", "dog"] * 6, first=12 * i)
    table(root, "test-00000-of-00001.parquet", ["dog"] * 5, first=100)
    data = images(tmp_path / "pets")
    assert counts(data) == [18, 6, 5] and data.class_names == ("cat", "dog") and data.test.labels.tolist() == [1] * 5
    assert sorted(all_samples(data)[:24]) == sorted(expected(range(24), [0, 1] * 12))
    table(root, "more.parquet", ["cat"])
    refused(tmp_path / "pets", "cannot be told into splits", "more.parquet is of none")
    one = tmp_path / "plain"
    table(one, "a.parquet", ["cat", "dog"] * 6)
    table(one, "b.parquet", ["dog", "cat"] * 6, first=12)
    assert counts(images(one)) == [16, 6, 2]
    assert sorted(all_samples(images(one))) == sorted(expected(range(24), [0, 1] * 6 + [1, 0] * 6))


def test_plain_bytes_and_rows_of_numbers_are_pictures_too(tmp_path):
    plain = table(tmp_path, "bytes.parquet", ["a", "b"] * 5, image=[content(i) for i in range(10)])
    assert sorted(all_samples(images(plain))) == sorted(expected(range(10), [0, 1] * 5))
    rows = [np.asarray(picture(i)).tolist() for i in range(10)]
    assert sorted(all_samples(images(table(tmp_path, "rows.parquet", ["a", "b"] * 5, image=rows)))) == sorted(
        expected(range(10), [0, 1] * 5)
    )


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([1, 2, 10], ("1", "2", "10"), [0, 1, 2]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
    ids=["names", "numbers", "truths"],
)
def test_classes_are_the_values_of_the_column(tmp_path, labels, names, numbers):
    data = images(table(tmp_path, "a.parquet", labels * 4))
    assert data.class_names == names
    assert sorted(all_samples(data)) == sorted(expected(range(12), numbers * 4))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["cat", None, "dog"], ["row 1 (columns image and label) has no label"]),
        (["cat", "", "dog"], ["row 1", "has no label"]),
        ([0.0, 1.5, 1.0], ["row 0", "label 0.0 (float)", "whole numbers or names", "data.label"]),
        ([0.0, None, 1.0], ["row 0"]),
        ([1.0, float("nan"), 1.0], ["row 0"]),
        ([[1], [2], [1]], ["row 0", "label [1] (list)"]),
        ([0, -1, 1], ["row 1", "label -1", "by custom", "data.test_split"]),
    ],
    ids=["missing", "blank", "floats", "floats and missing", "NaN", "lists", "minus one"],
)
def test_labels_that_are_none_are_refused_by_row_and_column(tmp_path, labels, words):
    refused(table(tmp_path, "a.parquet", labels * 4), tmp_path / "a.parquet", *words)


def test_numbers_stand_for_themselves_where_the_user_says_how_many_there_are(tmp_path):
    file = table(tmp_path, "a.parquet", [0, 1, 4] * 4)
    data = images(file, classes=6)
    assert data.class_names == tuple("012345") and set(data.train.labels.tolist()) == {0, 1, 4}
    assert data.notes[-1] != data.notes[1] and "3 class(es) have no training picture: 2, 3, 5" in data.notes
    refused(file, "row 2", "label 4, which is none of the 4 classes of train (0, 1, 2, 3)", classes=4)
    named = table(tmp_path, "b.parquet", ["a", "b"] * 4)
    refused(named, "data.classes=3, and the data has 2: a, b", classes=3)


def test_a_label_that_the_training_split_lacks_is_refused(tmp_path):
    table(tmp_path, "train-0.parquet", ["cat", "dog"] * 4)
    table(tmp_path, "test-0.parquet", ["cat", "Dog"])
    refused(tmp_path, "test-0.parquet, row 1", "label 'Dog'", "none of the 2 classes of train (cat, dog)")


def test_a_table_that_is_not_what_it_should_be_is_refused(tmp_path):
    file = table(tmp_path, "a.parquet", ["cat", "dog"] * 4, other=range(8))
    refused(file, "data.image=img is no column", "which has image, label, other", image="img")
    refused(file, "data.label=class is no column", "which has image, label, other", label="class")
    refused(file, "row 0", "has the shape ()", image="other")
    damaged = tmp_path / "b" / "a.parquet"
    damaged.parent.mkdir()
    for bad in (file.read_bytes()[:-9], b"PAR1", b"", b"<html>"):
        damaged.write_bytes(bad)
        refused(damaged, f"{damaged} cannot be read as Parquet", "fetch it again")
    holes = [{"bytes": content(i), "path": "x"} if i != 5 else {"bytes": None, "path": "5.png"} for i in range(8)]
    refused(table(tmp_path, "c.parquet", [0, 1] * 4, image=holes), "c.parquet, row 5", "no file 5.png")
    cut = [content(i)[: 900 if i == 3 else None] for i in range(8)]
    refused(table(tmp_path, "d.parquet", [0, 1] * 4, image=cut), "d.parquet, row 3", "cannot be read as a picture")
    one, two = tmp_path / "e", tmp_path / "e"
    table(one, "a.parquet", [0, 1] * 4, features=["cat", "dog"])
    table(two, "b.parquet", [0, 1] * 4, features=["dog", "cat"])
    refused(tmp_path / "e", "b.parquet says that the classes are ('dog', 'cat')", "a.parquet says ('cat', 'dog')")


def test_a_parquet_file_and_the_folder_that_it_was_made_of_are_the_same_data(tmp_path):
    root = class_folders(tmp_path / "pets", {"cat": 6, "dog": 6})
    file = table(tmp_path, "pets.parquet", ["cat"] * 6 + ["dog"] * 6)
    assert images(root).content == images(file).content


# the hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    datasets.disable_progress_bars()
    return tmp_path


def load_hf(path, **changes):
    return load("hf", {"path": str(path), "image": "image", "label": "label", "validation": 0.25, **changes})


def pets(folder, test=2):
    class_folders(folder / "train", {"cat": 4, "dog": 4})
    class_folders(folder / "test", {"cat": test // 2, "dog": test // 2}, first=100)
    return folder


def test_a_folder_is_read_through_datasets_as_it_was_before_there_was_a_cache(offline):
    data = load_hf(pets(offline / "pets"))
    assert counts(data) == [6, 2, 2] and data.shape == {"image": IMAGE, "classes": 2}
    assert data.class_names == ("cat", "dog")
    assert sorted(all_samples(data)) == sorted(expected([*range(8), 100, 101], [0] * 4 + [1] * 4 + [0, 1]))
    # mixed, then the last quarter held out, and the hash of all of them, as runs that were started then have it
    order = torch.randperm(8, generator=torch.Generator().manual_seed(splits.derive_seed("dbtrain", "held out")))
    assert data.train.labels.tolist() + data.validation.labels.tolist() == (order >= 4).long().tolist()
    assert load_hf(offline / "pets").content == images(offline / "pets").content == data.content


def test_the_test_split_is_mixed_as_the_training_split_is(offline):
    labels = load_hf(pets(offline / "pets", test=20)).test.labels
    assert labels.bincount().tolist() == [10, 10] and all(len(part.unique()) == 2 for part in labels.split(10))


def test_what_the_hub_lacks_or_says_otherwise_is_refused_or_made(offline):
    root = pets(offline / "pets")
    with pytest.raises(DataError, match="data.image=picture is no column of split train of .*which has image, label"):
        load_hf(root, image="picture")
    with pytest.raises(DataError, match="data.classes=1, and the data has 2: cat, dog"):
        load_hf(root, classes=1)
    wrong = root / "train" / "dog" / "002.png"
    wrong.write_bytes(content(3)[:500])
    with pytest.raises(DataError, match=rf"row 6 of split train .*columns image and label\), {wrong} cannot be read"):
        load_hf(root)
    wrong.write_bytes(content(3))
    shutil.rmtree(root / "test")
    data = load_hf(root)
    assert counts(data) == [5, 2, 1] and "the test split is the 10%" in data.notes[1]


def test_a_path_that_is_no_data_set_is_refused_in_one_line(offline):
    with pytest.raises(DataError) as caught:
        load_hf(offline / "nowhere")
    assert "\n" not in str(caught.value) and "nowhere" in str(caught.value)


def test_a_saved_16_bit_picture_is_not_halved_by_datasets(offline, tmp_path):
    from tests.unit.data.test_data_pixels import png

    root = pets(offline / "pets")
    (root / "train" / "cat" / "000.png").write_bytes(png(2, 3))
    with pytest.raises(DataError, match="000.png has 16 bits a channel"):
        load_hf(root)
