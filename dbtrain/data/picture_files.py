"""Where labelled pictures come from: folders of classes, Parquet files, and Hugging Face datasets.

Nothing is decoded here. Pillow, PyArrow and datasets are imported when they are needed: a node may lack them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, first_line

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of folders, files and splits that are understood, in lower case."""
NO_PICTURES = ("thumbs.db", "desktop.ini")
"""Files that systems put beside pictures."""
ROWS = 64
"""Rows of a Parquet file that are read at once."""


@dataclass(frozen=True)
class Part:
    """The pictures of one split, in the order of their files and rows."""

    labels: Sequence[Any]
    where: Callable[[int], str]
    """File, or file, row and column of a picture, for messages."""
    values: Callable[[], Iterator[Any]]
    """Each picture as :func:`dbtrain.data.pixels.pixels` takes it."""
    stamp: str
    """Differs when the files do."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Found:
    """Everything at a place."""

    parts: Mapping[str, Part]
    """The parts by the data's own names for them; ``train`` where there is only one."""
    classes: tuple[str, ...] | None
    """Their names, if the data say them; labels are then their places."""
    notes: tuple[str, ...] = ()


def split_named(name: str) -> str | None:
    """``train``, ``validation`` or ``test`` for a name that means it, else None."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def find_pictures(path: str, image: str, label: str) -> Found:
    """The pictures at a path: a Parquet file, a folder of Parquet files, or a folder of class folders.

    Raises:
        DataError: there are none, or they lie so that splits and classes cannot be told.
    """
    place = Path(path).absolute()  # workers have another working directory, and what they find is the same
    if place.is_file():
        if place.suffix != ".parquet":
            raise DataError(f"data.path={path} is a file, and not .parquet: give a Parquet file or a folder")
        return _parquet({"train": [place]}, image, label)
    if not place.is_dir():
        raise DataError(f"data.path={path} does not exist: give a folder of pictures or a Parquet file")
    files = sorted(f for f in place.rglob("*.parquet") if not _hidden(f, place))
    return _parquet(_split_files(files, place), image, label) if files else _class_folders(place)


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


# folders of classes


def _class_folders(root: Path) -> Found:
    places = _split_folders(root) or {"train": root}
    listed = {name: _listed(place) for name, place in places.items()}
    train = next(name for name in listed if split_named(name) == "train")
    classes = {name: place for place, name in enumerate(_in_order(listed[train][0]))}
    for split, (by_class, _) in listed.items():
        for name in by_class.keys() - classes.keys():
            raise DataError(f"{places[split] / name} is a class that {places[train]} lacks: fix its name, or add it")
    notes = [
        f"{len(left)} file(s) in {places[name]} are no pictures by their names and are left out: {left[0]}"
        for name, (_, left) in listed.items()
        if left
    ]
    parts = {name: _folder_part(by_class, classes) for name, (by_class, _) in listed.items()}
    return Found(parts, tuple(classes), tuple(notes))


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders that are named like splits; none where all of them are classes."""
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    splits = {entry.name: entry for entry in folders if split_named(entry.name)}
    if splits and len(splits) != len(folders):
        other = next(entry.name for entry in folders if entry.name not in splits)
        raise DataError(
            f"{root} has the folder {next(iter(splits))} beside {other}: put all classes into splits (train/{other}) "
            f"or none, and give a class that is named like a split another name"
        )
    if splits and not any(split_named(name) == "train" for name in splits):
        raise DataError(f"{root} has {', '.join(splits)} and no folder train: add it, or take the splits away")
    return splits


def _in_order(names: Mapping[str, Any]) -> list[str]:
    """Sorted; numbers by their value."""
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numbers else (0, name))


def _listed(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Picture files below each folder of a class, and files that are none."""
    from PIL import Image

    endings = Image.registered_extensions()
    by_class: dict[str, list[str]] = {}
    left: list[str] = []
    for entry in sorted(root.iterdir()):
        if _beside(entry.name):
            continue
        files = [str(entry)] if entry.is_file() else list(_files(entry))
        pictures = [file for file in files if Path(file).suffix.lower() in endings]
        left += sorted({*files} - {*pictures})
        if entry.is_file() and pictures:
            raise DataError(f"{entry} lies in no folder of a class: put each class into a folder of its own")
        if not entry.is_file():
            by_class[entry.name] = pictures
    empty = next((root / name for name, pictures in by_class.items() if not pictures), None)
    if empty:
        raise DataError(f"the class folder {empty} has no picture: fill it, or remove it")
    if not by_class:
        raise DataError(f"{root} has neither folders of classes nor Parquet files: give the folder that has")
    return by_class, left


def _beside(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in NO_PICTURES


def _files(root: Path) -> Iterator[str]:
    """All files below a folder, sorted, through links to folders; hidden ones are left out."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not _beside(name))
        yield from (os.path.join(folder, name) for name in sorted(names) if not _beside(name))


def _folder_part(by_class: Mapping[str, list[str]], classes: Mapping[str, int]) -> Part:
    files = [file for name in classes for file in by_class.get(name, ())]
    labels = [place for name, place in classes.items() for _ in by_class.get(name, ())]
    return Part(labels, files.__getitem__, lambda: iter(files), _stamp(files))


def _stamp(files: Sequence[str | Path]) -> str:
    """Hash of names, sizes and times: whoever changes a file's content changes the time of its last change
    too."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): fix its link or permissions") from error
        digest.update(
            f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n".encode(errors="replace")
        )
    return digest.hexdigest()


# Parquet files


def _split_files(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Files by split: by the folder, or by the name's beginning as in train-00000-of-00002.parquet."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        inner = file.relative_to(root)
        names = [*inner.parts[:-1], inner.stem.replace("_", "-").split("-")[0]]
        named = next((name for name in names if split_named(name)), None)
        splits.setdefault(named or "", []).append(file)
    if set(splits) == {""}:
        return {"train": splits[""]}
    if "" in splits or not any(split_named(name) == "train" for name in splits):
        stray = splits.get("", files)[0]
        raise DataError(
            f"the Parquet files of {root} cannot be told into splits: {stray} is of none, or there is no train; name "
            "all of them as in train-0.parquet and test-0.parquet, or none"
        )
    return splits


def _parquet(splits: Mapping[str, list[Path]], image: str, label: str) -> Found:
    names = {file: _class_names(file, image, label) for files in splits.values() for file in files}
    first, known = next(iter(names.items()))
    for file, other in names.items():
        if other != known:
            raise DataError(f"{file} says that the classes are {other}, and {first} says {known}: make them equal")
    return Found({name: _parquet_part(files, image, label) for name, files in splits.items()}, known)


def _class_names(file: Path, image: str, label: str) -> tuple[str, ...] | None:
    """Names of the classes, where the datasets library wrote them into the file; the columns are checked."""
    schema = _read(file, lambda opened: opened.schema_arrow)
    check_columns(schema.names, image, label, str(file))
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = described.get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(names) if names else None


def check_columns(columns: Sequence[str], image: str, label: str, where: str) -> None:
    """Raise DataError, with the columns that there are, if one of the two is missing."""
    for key, name in (("image", image), ("label", label)):
        if name not in columns:
            raise DataError(
                f"data.{key}={name} is no column of {where}, which has {', '.join(columns)}: set data.{key} to one"
            )


def _read(file: Path, get: Callable[[Any], Any]) -> Any:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            return get(opened)
    except Exception as error:  # Arrow's errors have no common base but this
        raise DataError(f"{file} cannot be read as Parquet ({first_line(error)}): fetch it again") from error


def _parquet_part(files: Sequence[Path], image: str, label: str) -> Part:
    columns = [_read(file, lambda opened: opened.read(columns=[label])[label].to_pylist()) for file in files]
    places = [(file, row) for file, labels in zip(files, columns, strict=True) for row in range(len(labels))]

    def where(row: int) -> str:
        file, number = places[row]
        return f"{file}, row {number} (columns {image} and {label})"

    def values() -> Iterator[Any]:
        import pyarrow.parquet

        for file in files:
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    for batch in opened.iter_batches(ROWS, columns=[image]):
                        yield from batch.column(0).to_pylist()
            except (OSError, ValueError) as error:  # ArrowInvalid is the latter
                raise DataError(f"{file} cannot be read as Parquet ({first_line(error)}): fetch it again") from error

    stamp = hashlib.sha256(json.dumps([_stamp(files), image, label]).encode()).hexdigest()
    return Part([value for labels in columns for value in labels], where, values, stamp)


# the Hugging Face hub


def hub_pictures(path: str, image: str, label: str) -> Found:
    """A data set of the hub, or a local path, as the `datasets` library reads it.

    Raises:
        DataError: it cannot be loaded, or lacks a column.
    """
    try:
        import datasets

        loaded: Any = datasets.load_dataset(path)
    except ImportError as error:
        raise DataError(f"data.source=hf needs the extra packages of dbtrain[hub] ({error}): install them") from error
    except Exception as error:
        raise DataError(f"data.path={path!r} cannot be read as a Hugging Face data set: {first_line(error)}") from error
    for name, split in loaded.items():
        check_columns(split.column_names, image, label, f"split {name} of {path}")
    features = {name: split.features[label] for name, split in loaded.items()}
    known = next((tuple(f.names) for f in features.values() if isinstance(f, datasets.ClassLabel)), None)
    return Found({name: _hub_part(split, image, label, path) for name, split in loaded.items()}, known)


def _hub_part(split: Any, image: str, label: str, path: str) -> Part:
    import datasets

    # not decoded: its own decoder makes 8 bits of 16 without a word
    if isinstance(split.features[image], datasets.Image):
        split = split.cast_column(image, datasets.Image(decode=False))

    def where(row: int) -> str:
        return f"row {row} of split {split.split} of {path} (columns {image} and {label})"

    def values() -> Iterator[Any]:
        for row in split.select_columns([image]):
            yield row[image]

    return Part(split.with_format(None)[label][:], where, values, f"{split._fingerprint}/{image}/{label}")
