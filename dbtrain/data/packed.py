"""A text as one row of token numbers in a memory-mapped file, packed once and cached under the hash of its content."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbtrain.data.content import file_hash
from dbtrain.data.splits import DataSet
from dbtrain.data.tokenizers import Tokenizer
from dbtrain.data.transfer import send
from dbtrain.errors import DataError

FORMAT = "1"
MARK = "dbtrain tokens"
HASH_DIGITS = 64


def cache_folder(chosen: str | None) -> Path:
    """The chosen folder, or ``dbtrain`` in the user's cache."""
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbtrain"


def content_key(*parts: str) -> str:
    """File name of the packed tokens of a content (its hash) under a tokenizer (its identity)."""
    return hashlib.sha256("\n".join((MARK, FORMAT, *parts)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Packed:
    """A text as token numbers."""

    tokens: NDArray[Any]
    """(n,), read-only."""
    content: str
    """Their hash: that of the files would be another after gzip, and the hub's names a download, not a text."""


def pack(texts: Iterable[str], tokenizer: Tokenizer, folder: Path, key: str) -> Packed:
    """The tokens of a text, from the cache if it has them whole.

    A file is written under another name, synced and renamed, so that workers may pack the same text at once.

    Raises:
        DataError: the folder cannot be written.
    """
    kind = _dtype(tokenizer.vocabulary)
    file = folder / f"{key}.{kind}"
    size = folder / f"{key}.{kind}.size"
    try:
        # the size is written after the tokens: without it, or with another, the file is not whole
        if not (file.is_file() and size.is_file() and size.read_text() == str(file.stat().st_size)):
            folder.mkdir(parents=True, exist_ok=True)
            _kept_hash(file).unlink(missing_ok=True)
            count = _write(file, (tokenizer.encode(text).astype(kind).tobytes() for text in texts))
            _write(size, [str(count).encode()])
        if not file.stat().st_size:
            raise DataError("the text is empty: give files that hold text as data.path")
        return Packed(cast(NDArray[Any], np.memmap(file, kind, "r")), _content(file))
    except OSError as error:
        raise DataError(f"packed tokens cannot be kept in {folder} ({error}): set data.cache to another") from error


def _content(file: Path) -> str:
    """Hash of a packed file, which is read for it once: a long text should not be read whole at every start."""
    kept = _kept_hash(file)
    if kept.is_file() and len(known := kept.read_text()) == HASH_DIGITS:
        return known
    content = file_hash(file)
    with suppress(OSError):  # a cache that others packed may be read-only
        _write(kept, [content.encode()])
    return content


def _kept_hash(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _dtype(vocabulary: int) -> str:
    return "uint8" if vocabulary <= 2**8 else "uint16" if vocabulary <= 2**16 else "uint32"


def _write(file: Path, parts: Iterable[bytes]) -> int:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(handle)
            count = stream.tell()
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    return count


class TokenWindows:
    """Windows of `length` tokens that follow each other in a packed text; what is left at its end is not used.

    Args:
        tokens: (n,) token numbers.
        length: of a window.
        tokenizer: whose numbers they are.

    Raises:
        DataError: there is not one whole window.
    """

    def __init__(self, tokens: NDArray[Any], length: int, tokenizer: Tokenizer) -> None:
        if len(tokens) < length:
            raise DataError(
                f"a split of {len(tokens)} tokens has no window of data.length={length}: give more text, a shorter "
                "length or another data.validation or data.test"
            )
        self.tokens = tokens[: len(tokens) // length * length].reshape(-1, length)
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """``tokens`` (n, length) int64."""
        rows = self.tokens[indices.cpu().numpy()].astype(np.int64)
        return {"tokens": send(torch.from_numpy(rows), device)}

    def characters(self, indices: Tensor) -> int:
        """Characters of these windows together."""
        return sum(self.tokenizer.characters(self.tokens[index].tolist()) for index in indices.tolist())

    def text(self, index: int) -> str:
        """The text of a window."""
        return self.tokenizer.decode(self.tokens[index].tolist())


def token_data_set(packed: Packed, tokenizer: Tokenizer, length: int, validation: float, test: float) -> DataSet:
    """Three contiguous parts of a packed text: the last `test` share, before it the `validation` share, the rest.

    Raises:
        DataError: a part has not one whole window.
    """
    tokens = packed.tokens
    ends = [round(len(tokens) * (1 - test - validation)), round(len(tokens) * (1 - test))]
    train, held_out, tested = (TokenWindows(part, length, tokenizer) for part in np.split(tokens, ends))
    shape: dict[str, object] = {"length": length, "vocabulary": tokenizer.vocabulary}
    return DataSet(train, held_out, tested, shape, packed.content)
