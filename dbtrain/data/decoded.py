"""Decoded pictures as bytes in a memory-mapped file.

They are decoded once, all blocks of a machine share them, and they are never all in memory.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbtrain.data.content import samples_hash
from dbtrain.data.picture_files import Part
from dbtrain.data.pixels import Want, pixels
from dbtrain.errors import DataError

FORMAT = 1
CHUNK = 64
"""Pictures that are decoded side by side."""
TOLD_EVERY_S = 15.0

Rows = Mapping[str, tuple[str, Tensor]]
"""Rows of each split, by its name: the part that its pictures come from, and their rows (n,) in it, in the
order of the file."""


def decoded(
    parts: Mapping[str, Part], rows: Rows, labels: Mapping[str, Tensor], want: Want, folder: Path
) -> tuple[dict[str, Tensor], str]:
    """Pictures (n, C, H, W) uint8 by split, and the hash of all of them with their labels.

    They are read from `folder` if they were decoded before, and what is read is hashed again:
    a damaged file is made anew. One process of a machine decodes, others wait for it.

    Args:
        parts: the files, by name.
        rows: the pictures that make up each split.
        labels: (n,) int64 by split.
        want: the shape that pictures are brought to.
        folder: folder for the files; made if it is not there.

    Raises:
        DataError: a picture is wrong or of another shape than the first, or the folder cannot hold them.
    """
    file = folder / f"pictures-{_key(parts, rows, labels, want)}.uint8"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(file):
            return _read(file, rows, labels) or _made(file, parts, rows, labels, want)
    except OSError as error:
        raise DataError(
            f"decoded pictures cannot be kept in {folder} ({error.strerror or error}): set data.cache to another folder"
        ) from error


def _key(parts: Mapping[str, Part], rows: Rows, labels: Mapping[str, Tensor], want: Want) -> str:
    """Changes with the files, their labels, the splits, the wanted shape, and the decoder."""
    from PIL import __version__

    stamps = {name: part.stamp for name, part in parts.items()}
    chosen = samples_hash((which, labels[split]) for split, (_, which) in rows.items())
    origin = [[split, part] for split, (part, _) in rows.items()]
    description = json.dumps([FORMAT, __version__, stamps, origin, chosen, asdict(want)], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()[:32]


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time; in a folder without locks, or that others own, each is on its own."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(open(file.with_suffix(".lock"), "a")), fcntl.LOCK_EX)
        yield


def _read(file: Path, rows: Rows, labels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str] | None:
    """What was decoded before; None if it is missing or not what was written."""
    try:
        known: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
        shape, content = tuple(known["shape"]), known["content"]
        if file.stat().st_size != math.prod(shape):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    images = _cut(file, shape, rows)
    return (images, content) if _content(images, rows, labels) == content else None


def _content(images: Mapping[str, Tensor], rows: Rows, labels: Mapping[str, Tensor]) -> str:
    # the pixels, not the files: another copy or format of the same pictures is the same data
    return samples_hash((images[split], labels[split]) for split in rows)


def _cut(file: Path, shape: tuple[int, ...], rows: Rows) -> dict[str, Tensor]:
    # read only: the kernel refuses a private mapping that is larger than the memory
    mapped = np.memmap(file, np.uint8, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        whole = torch.from_numpy(mapped)
    cut = torch.split(whole, [len(which) for _, which in rows.values()])
    return dict(zip(rows, cut, strict=True))


def _made(
    file: Path, parts: Mapping[str, Part], rows: Rows, labels: Mapping[str, Tensor], want: Want
) -> tuple[dict[str, Tensor], str]:
    total = sum(len(which) for _, which in rows.values())
    train = parts[rows["train"][0]]
    value = next(train.values())
    name = _where(train, 0, value)
    first = pixels(value, name, want)
    prefix = f".{file.name}.{socket.gethostname()}."
    for left in file.parent.glob(f"{escape(prefix)}*"):
        if not Path("/proc", left.name.removeprefix(prefix)).exists():  # its process was killed
            left.unlink(missing_ok=True)
    draft = file.with_name(f"{prefix}{os.getpid()}")
    try:
        _reserve(draft, total, first.shape)
        out = np.memmap(draft, np.uint8, "r+", shape=(total, *first.shape))
        _fill(out, parts, rows, want, _same_shape(first, name))
        out.flush()
        content = _content(_cut(draft, out.shape, rows), rows, labels)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    file.with_suffix(".json").write_text(json.dumps({"shape": out.shape, "content": content}))
    return _cut(file, out.shape, rows), content


def _reserve(draft: Path, total: int, shape: tuple[int, ...]) -> None:
    """Take the room on the disk before the work: a full disk would end the process without a word later."""
    size, free = total * math.prod(shape), shutil.disk_usage(draft.parent).free
    if size > free:
        shape_in_words = "x".join(map(str, shape))
        raise DataError(
            f"{total:,} pictures of {shape_in_words} bytes take {size / 2**30:.2f} GiB decoded, and {draft.parent} has "
            f"{free / 2**30:.2f} GiB free: set data.cache to a folder on a larger disk, or a smaller data.size"
        )
    with draft.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)


def _fill(
    out: NDArray[np.uint8],
    parts: Mapping[str, Part],
    rows: Rows,
    want: Want,
    check: Callable[[NDArray[np.uint8], str], None],
) -> None:
    """Decode every part in its own order, each picture into its place."""
    done, told_at, start = 0, time.monotonic(), 0
    places = {name: torch.full((len(parts[name]),), -1) for name, _ in rows.values()}
    for name, which in rows.values():
        places[name][which] = torch.arange(start, start + len(which))
        start += len(which)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, place in places.items():
            part, values, at = parts[name], parts[name].values(), 0
            while chunk := list(islice(values, CHUNK)):
                jobs = [pool.submit(_one, part, at + i, value, want, check) for i, value in enumerate(chunk)]
                for i, job in enumerate(jobs):
                    out[int(place[at + i])] = job.result()
                at, done = at + len(chunk), done + len(chunk)
                if time.monotonic() - told_at > TOLD_EVERY_S:
                    told_at = time.monotonic()
                    print(f"image {done:,} of {len(out):,} pictures", file=sys.stderr, flush=True)


def _one(
    part: Part, row: int, value: Any, want: Want, check: Callable[[NDArray[np.uint8], str], None]
) -> NDArray[np.uint8]:
    where = _where(part, row, value)
    image = pixels(value, where, want)
    check(image, where)
    return image


def _where(part: Part, row: int, value: Any) -> str:
    """The file, row and column; and the name of the file that a table keeps beside the bytes."""
    file = value.get("path") if isinstance(value, dict) else None
    return f"{part.where(row)}, {file}" if file else part.where(row)


def _same_shape(first: NDArray[np.uint8], name: str) -> Callable[[NDArray[np.uint8], str], None]:
    """Refuse a picture of another shape than the first."""

    def check(other: NDArray[np.uint8], where: str) -> None:
        if other.shape[0] != first.shape[0]:
            raise DataError(
                f"{where} has {other.shape[0]} channel(s), and {name} has {first.shape[0]}: set data.channels=1 or 3 "
                "to convert all of them"
            )
        if other.shape != first.shape:
            raise DataError(
                f"{where} is {_size(other)}, and {name} is {_size(first)} (width x height): set data.size, and "
                "data.resize to crop, pad or squash"
            )

    return check


def _size(picture: NDArray[np.uint8]) -> str:
    return f"{picture.shape[2]}x{picture.shape[1]}"
