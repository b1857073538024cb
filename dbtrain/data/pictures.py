"""Labelled pictures as people have them: class folders,
Parquet files, and data sets of the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dbtrain.data.decoded import decoded
from dbtrain.data.labels import Labels, listed, number_classes
from dbtrain.data.packed import cache_folder
from dbtrain.data.picture_files import Found, find_pictures, hub_pictures, split_named
from dbtrain.data.pixels import Want
from dbtrain.data.splits import DataSet, LabelledImages, mixed
from dbtrain.errors import DataError

MADE = "the {share:.0%} of {origin} that a draw with a fixed seed put last"
"""How a split is described that the data does not have."""


def images(
    path: str,
    image: str = "image",
    label: str = "label",
    classes: int | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    test_split: str | None = None,
    cache: str | None = None,
    **shape: Any,
) -> DataSet:
    """A folder of class folders, a Parquet file, or a folder of Parquet files; with or without splits.

    Args:
        path: path of the folder or file.
        image, label: columns of a Parquet file.
        classes: how many there must be; None to take what there is.
        validation, test: shares that are split off the training pictures where the data has no such split.
        test_split: name of the split to test on, if not ``test``.
        cache: folder of the decoded pictures; by default in the user's cache.
        shape: fields of :class:`Want`.

    Raises:
        DataError: something is missing, damaged, or not what it should be;
            the message names the file and row.
    """
    pictures = find_pictures(path, image, label)
    return _data_set(pictures, path, classes, validation, test, test_split, cache, Want(**shape))


def hugging_face(
    path: str,
    image: str = "image",
    label: str = "label",
    classes: int | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    test_split: str | None = None,
    cache: str | None = None,
    mix: bool = True,
    **shape: Any,
) -> DataSet:
    """A data set of the hub, or a local path that `datasets` reads; arguments as of :func:`images`.

    Args:
        mix: put the pictures into a fixed random order, as they may be sorted by class.

    Raises:
        DataError: it cannot be loaded, or something is missing, damaged, or not what it should be.
    """
    pictures = hub_pictures(path, image, label)
    return _data_set(pictures, path, classes, validation, test, test_split, cache, Want(**shape), mix)


def _data_set(
    collection: Found,
    path: str,
    classes: int | None,
    validation: float,
    test: float,
    test_split: str | None,
    cache: str | None,
    want: Want,
    mix: bool = True,
) -> DataSet:
    roles = _roles(collection, path, test_split)
    used = {name: collection.parts[name] for name in roles.values()}
    told_labels = {split: Labels(used[name].labels, used[name].where) for split, name in roles.items()}
    numbers, names = number_classes(told_labels, collection.classes, classes)
    rows, made = _rows({split: len(used[name]) for split, name in roles.items()}, validation, test, mix)
    labels = {split: numbers[origin][which] for split, (origin, which) in rows.items()}
    sources = {split: (roles[origin], which) for split, (origin, which) in rows.items()}
    pictures, content = decoded(used, sources, labels, want, cache_folder(cache))
    train, held_out, last = (LabelledImages(pictures[split], labels[split], len(names)) for split in rows)
    notes = (*_described((train, held_out, last), names), *made, *_left(collection, roles), *collection.notes)
    size = {"image": tuple(train.images.shape[1:]), "classes": len(names)}
    return DataSet(train, held_out, last, size, content, names, notes)


def _roles(collection: Found, path: str, test_split: str | None) -> dict[str, str]:
    """The part of the data for each of ``train``,
    ``validation`` and ``test``; without those that it lacks."""
    if test_split is not None and test_split not in collection.parts:
        raise DataError(f"data.test_split={test_split} is no split of {path}, which has {', '.join(collection.parts)}")
    roles: dict[str, str] = {} if test_split is None else {"test": test_split}
    for name in collection.parts:
        split = split_named(name)
        if split is None or name == test_split:
            continue
        if split in roles and split != "test":
            raise DataError(f"{path} has {roles[split]} and {name}, which are both {split}: take one away")
        roles.setdefault(split, name)
    if "train" not in roles:
        raise DataError(f"{path} has the splits {', '.join(collection.parts)}, and none is called train: add it")
    return {split: roles[split] for split in ("train", "validation", "test") if split in roles}


def _rows(
    counts: Mapping[str, int], validation: float, test: float, mix: bool
) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """The part that each split takes its pictures from, with their rows in it; and notes on how missing
    splits were made."""
    order = {split: mixed(count) if mix else torch.arange(count) for split, count in counts.items()}
    rest, made, rows = order["train"], [], {}
    # validation is cut last, as it is where a test split is there
    for split, share in (("test", test), ("validation", validation)):
        if split in order:
            rows[split] = (split, order[split])
            continue
        cut = len(rest) - round(len(rest) * share)
        if not 0 < cut < len(rest):
            raise DataError(f"data.{split}={share} leaves {cut} of {len(rest)} samples for training")
        origin = "the training pictures" if split == "test" or "test" in order else "the others"
        made.append(f"the {split} split is {MADE.format(share=share, origin=origin)}: {len(rest) - cut} pictures")
        rows[split], rest = ("train", rest[cut:]), rest[:cut]
    return {"train": ("train", rest), "validation": rows["validation"], "test": rows["test"]}, made


def _described(splits: tuple[LabelledImages, ...], names: tuple[str, ...]) -> list[str]:
    channels, height, width = splits[0].images.shape[1:]
    sizes = [f"{len(split):,} {name}" for name, split in zip(("training", "validation", "test"), splits, strict=True)]
    notes = [
        f"{', '.join(sizes)} pictures of {width}x{height} (width x height) in {channels} channel(s), "
        f"{len(names)} class(es): {listed(names)}"
    ]
    counts = splits[0].labels.bincount(minlength=len(names)).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        notes.append(f"{len(empty)} class(es) have no training picture: {listed(empty)}")
    return notes


def _left(collection: Found, roles: Mapping[str, str]) -> list[str]:
    left = [name for name in collection.parts if name not in roles.values()]
    return [f"not used: split {', '.join(left)}"] if left else []
