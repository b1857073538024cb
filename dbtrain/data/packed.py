"""A text as one row of token numbers in a memory-mapped file,
packed once and cached under the hash of its content."""

import hashlib
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbtrain.data.batching import send
from dbtrain.data.splits import DataSet
from dbtrain.data.tokenizers import Tokenizer
from dbtrain.errors import DataError

FORMAT = "2"
"""Raised when the same text would be packed as other tokens."""
MARK = "dbtrain tokens"
PIECE = 1 << 24
"""Tokens that are verified at once."""


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
    """Their hash: that of the files would be another after gzip,
    and the hub's names a download, not a text."""


def pack(texts: Iterable[str], tokenizer: Tokenizer, folder: Path, key: str) -> Packed:
    """The tokens of a text, from the cache if it has them undamaged.

    All tokens are read and hashed, so that the content is that of what a run trains on. A file whose hash is
    not the one that was written beside it is packed again. Files are written under another name, synced and
    renamed, so that workers may pack the same text at once, and get their modes by the umask, so that others
    can share the cache.

    Raises:
        DataError: the folder cannot be written, the text is empty,
            or the tokenizer gives a number that is none of its.
    """
    file = folder / f"{key}.{_dtype(tokenizer.vocabulary)}"
    try:
        return _cached(file, tokenizer) or _packed(texts, tokenizer, file)
    except OSError as error:
        state = f", and {file.name} in it is damaged or not finished" if file.is_file() else ""
        raise DataError(
            f"packed tokens cannot be kept in {folder} ({error}){state}: set data.cache to another folder"
        ) from error


def _cached(file: Path, tokenizer: Tokenizer) -> Packed | None:
    """What was packed before; None if it is missing, damaged, or has a number beyond the vocabulary."""
    hash_file = _hash_file(file)
    if not (file.is_file() and hash_file.is_file() and file.stat().st_size):
        return None
    # read before the tokens: another process that finds them damaged as well may replace both meanwhile
    written = hash_file.read_bytes()
    try:
        tokens = cast(NDArray[Any], np.memmap(file, _dtype(tokenizer.vocabulary), "r"))
    except ValueError:  # half a number at its end
        return None
    digest, largest = hashlib.sha256(), 0
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
    content = digest.hexdigest()
    undamaged = written == content.encode() and largest < tokenizer.vocabulary
    return Packed(tokens, content) if undamaged else None


def _packed(texts: Iterable[str], tokenizer: Tokenizer, file: Path) -> Packed:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = _dtype(tokenizer.vocabulary)
    content = _write(file, (_numbers(tokenizer, text).astype(kind).tobytes() for text in texts))
    # after the tokens: without its hash a file is not whole
    _write(_hash_file(file), [content.encode()])
    if not file.stat().st_size:
        raise DataError(
            f"the text is empty, or data.tokenizer leaves nothing of it, as none of its {tokenizer.vocabulary} tokens "
            "stands for what it holds: give other text, or another tokenizer such as data.tokenizer=bytes"
        )
    if packed := _cached(file, tokenizer):
        return packed
    raise DataError(
        f"{file} does not hold what was written into it: check the disk, or set data.cache to another folder"
    )


def _hash_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _numbers(tokenizer: Tokenizer, text: str) -> NDArray[Any]:
    numbers = tokenizer.encode(text)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < tokenizer.vocabulary:
        wrong = numbers.max() if numbers.min() >= 0 else numbers.min()
        raise DataError(
            f"data.tokenizer gives token {wrong}, and its vocabulary has the numbers 0 to {tokenizer.vocabulary - 1}: "
            "save the tokenizer again with all its tokens"
        )
    return numbers


def _dtype(vocabulary: int) -> str:
    return "uint8" if vocabulary <= 2**8 else "uint16" if vocabulary <= 2**16 else "uint32"


def _write(file: Path, parts: Iterable[bytes]) -> str:
    """Write a whole file or none; returns its SHA-256."""
    digest, name = hashlib.sha256(), file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with name.open("xb") as stream:
            for part in parts:
                stream.write(part)
                digest.update(part)
            stream.flush()
            os.fsync(stream.fileno())
        name.replace(file)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


class TokenWindows:
    """Windows of `length` tokens that follow each other in a packed text;
    what is left at its end is not used.

    Args:
        tokens: (n,) token numbers.
        length: length of a window.
        tokenizer: the tokenizer that made the numbers.

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
    """Three contiguous parts of a packed text: the last `test` share,
    before it the `validation` share, the rest.

    Raises:
        DataError: a part has not one whole window.
    """
    tokens = packed.tokens
    ends = [round(len(tokens) * (1 - test - validation)), round(len(tokens) * (1 - test))]
    train, held_out, tested = (TokenWindows(part, length, tokenizer) for part in np.split(tokens, ends))
    shape: dict[str, object] = {"length": length, "vocabulary": tokenizer.vocabulary}
    return DataSet(train, held_out, tested, shape, packed.content)
