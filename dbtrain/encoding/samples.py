"""What is encoded: pictures with the class of their folder, or with a caption."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.data.picture_files import find_pictures
from dbtrain.errors import DataError

METADATA = "metadata.jsonl"
"""File in a folder of pictures: a line for each, with `file_name` and `text`."""


@dataclass(frozen=True)
class Samples:
    """Pictures in a fixed order."""

    pictures: Callable[[], Iterator[Any]]
    """Each as `pixels` of `data/pixels.py` takes it."""
    names: Callable[[int], str]
    """What a picture is called in messages."""
    told: Sequence[Any]
    """Class number or caption of each picture."""
    stamp: str
    """Changes with the pictures, their order and what is told of them."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.told)


def with_classes(path: str) -> Samples:
    """All pictures of a folder of class folders, or of Parquet files, with the numbers of their classes.

    Raises:
        DataError: there are none, or they lie so that classes cannot be told.
    """
    found = find_pictures(path, "image", "label")
    parts = list(found.parts.values())
    labels = [label for part in parts for label in part.labels]
    names = found.classes or tuple(map(str, sorted(set(labels))))
    numbers = labels if found.classes else [names.index(str(label)) for label in labels]
    where = [part.where for part in parts]
    ends = [sum(len(part) for part in parts[: n + 1]) for n in range(len(parts))]

    def name(index: int) -> str:
        part = next(n for n, end in enumerate(ends) if index < end)
        return where[part](index - (ends[part] - len(parts[part])))

    stamp = hashlib.sha256("\n".join(part.stamp for part in parts).encode()).hexdigest()
    return Samples(lambda: (v for part in parts for v in part.values()), name, numbers, stamp, names)


def with_captions(path: str) -> Samples:
    """All pictures below a folder with their captions: of `METADATA` in it, or of a .txt file beside each.

    Raises:
        DataError: there is no picture, or one has no caption.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path} is no folder: give a folder of pictures with {METADATA}, or with a .txt beside each")
    pairs = _listed(root) if (root / METADATA).is_file() else _beside(root)
    if not pairs:
        raise DataError(f"{path} holds no pictures with captions: put them there, with {METADATA} or a .txt for each")
    stamp = hashlib.sha256()
    for file, caption in pairs:
        if not file.is_file():
            raise DataError(f"{root / METADATA} names {file.relative_to(root)}, which is not there: put it there")
        status = file.stat()
        stamp.update(json.dumps([str(file.relative_to(root)), status.st_size, status.st_mtime_ns, caption]).encode())
    files = [str(file) for file, _ in pairs]
    return Samples(lambda: iter(files), files.__getitem__, [caption for _, caption in pairs], stamp.hexdigest())


def _listed(root: Path) -> list[tuple[Path, str]]:
    pairs = []
    for number, line in enumerate((root / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{root / METADATA}, line {number}: each line is an object with file_name and text")
        pairs.append((root / name, text))
    return pairs


def _beside(root: Path) -> list[tuple[Path, str]]:
    from PIL import Image

    endings = Image.registered_extensions()
    files = [f for f in sorted(root.rglob("*")) if f.suffix.lower() in endings and not f.name.startswith(".")]
    pairs = []
    for file in files:
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise DataError(f"{file} has no caption: write {caption.name} beside it, or a {METADATA} for all")
        pairs.append((file, caption.read_text(encoding="utf-8").strip()))
    return pairs
