"""Tokenizers turn text into token numbers and back: 27 letters, bytes, or a Hugging Face tokenizer that lies
on disk."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dbtrain.errors import DataError, first_line

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """A fixed vocabulary; its numbers run from 0 to `vocabulary` - 1."""

    vocabulary: int
    identity: str
    """Changes whenever `encode` would give other numbers: part of the cache's key."""

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        """Token numbers (n,) of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers."""

    def characters(self, tokens: Sequence[int]) -> int:
        """Characters for which the tokens stand, by which bits are divided;
        bytes of UTF-8 count as characters."""


class Letters:
    """The space (0) and the letters a to z (1 to 26); everything else becomes a single space, as in text8.

    Accents fall off their letters first; a leading space is dropped, so that pieces of a text can be joined.
    """

    vocabulary = 27
    identity = "letters-1"

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        """(n,) uint8."""
        if not text.isascii():
            text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
        plain = re.sub("[^a-z]+", " ", text.lower()).lstrip(" ").encode("ascii")
        codes = np.frombuffer(plain, np.uint8)
        return np.where(codes == ord(" "), 0, codes - (ord("a") - 1)).astype(np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        """Lower-case letters and spaces."""
        return "".join(" abcdefghijklmnopqrstuvwxyz"[token] for token in tokens)

    def characters(self, tokens: Sequence[int]) -> int:
        """One each."""
        return len(tokens)


class Bytes:
    """The 256 bytes of UTF-8."""

    vocabulary = 256
    identity = "bytes-1"

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        """(n,) uint8."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(tokens).decode("utf-8", "replace")

    def characters(self, tokens: Sequence[int]) -> int:
        """One each."""
        return len(tokens)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, or a folder that holds one, as `tokenizers` and `transformers` save it.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise DataError(
                f"data.tokenizer={path!r} needs the extra packages of dbtrain[text] ({error}): install them, or choose "
                "letters or bytes"
            ) from error
        file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise DataError(
                f"data.tokenizer={path!r} is neither letters, bytes, nor a {TOKENIZER_FILE} or a folder that holds one"
            )
        try:
            content = file.read_bytes()
            self._tokenizer: Any = Loaded.from_str(content.decode())
            numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        except Exception as error:
            reason = first_line(error)
            raise DataError(
                f"{file} cannot be read as a tokenizer of Hugging Face ({reason}): save it again"
            ) from error
        if not numbers:
            raise DataError(f"{file} is a tokenizer without any token: train it, and save it again")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocabulary = max(numbers) + 1
        self.identity = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> NDArray[np.integer[Any]]:
        """(n,) int64, without the special tokens of the ends."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text, special tokens left out."""
        decoded: str = self._tokenizer.decode(list(tokens))
        return decoded

    def characters(self, tokens: Sequence[int]) -> int:
        """Length of their text."""
        return len(self.decode(tokens))


def load_tokenizer(name: str) -> Tokenizer:
    """``letters``, ``bytes``, or the path of a Hugging Face tokenizer.

    Raises:
        DataError: there is no such tokenizer.
    """
    plain: dict[str, type[Letters] | type[Bytes]] = {"letters": Letters, "bytes": Bytes}
    return plain[name]() if name in plain else HuggingFaceTokenizer(name)
