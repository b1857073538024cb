"""Sources of text: files, Hugging Face datasets, a dictionary that Debian ships, and Python's own documentation."""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dbtrain.data.content import file_hash
from dbtrain.data.packed import cache_folder, content_key, pack, token_data_set
from dbtrain.data.splits import DataSet
from dbtrain.data.tokenizers import load_tokenizer
from dbtrain.errors import DataError, first_line

CHUNK = 1 << 20
"""Characters that are encoded at once; a piece ends at the end of a line."""
GCIDE = "/usr/share/dictd/gcide.dict.dz"
"""Where Debian's package dict-gcide puts the GNU Collaborative International Dictionary of English."""


def text_files(path: str, tokenizer: str, length: int, validation: float, test: float, cache: str | None) -> DataSet:
    """A file, or all ``.txt`` and ``.txt.gz`` files of a folder, in the order of their names; UTF-8, gzipped or not.

    Raises:
        DataError: there is no such file, it is damaged or not readable, or holds too little text.
    """
    digest = hashlib.sha256()
    try:
        files = _files(Path(path))
        for file in files:
            digest.update(file_hash(file).encode())
    except OSError as error:
        raise DataError(f"data.path={path!r} cannot be read ({error}): mend its files or their permissions") from error
    texts = (piece for file in files for piece in _lines(file))
    return _data_set(texts, digest.hexdigest(), tokenizer, length, validation, test, cache)


def gcide(path: str | None, tokenizer: str, length: int, validation: float, test: float, cache: str | None) -> DataSet:
    """The dictionary of Debian's dict-gcide.

    Raises:
        DataError: the package is not installed.
    """
    file = path or GCIDE
    if not Path(file).is_file():
        raise DataError(f"no {file}: install Debian's package dict-gcide, or give its file as data.path")
    return text_files(file, tokenizer, length, validation, test, cache)


def python_topics(tokenizer: str, length: int, validation: float, test: float, cache: str | None) -> DataSet:
    """The language reference that comes with Python (half a million characters; differs between its versions)."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics)) + "\n"
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return _data_set([whole], digest, tokenizer, length, validation, test, cache)


def hugging_face_text(
    path: str,
    name: str | None,
    split: str,
    column: str,
    tokenizer: str,
    length: int,
    validation: float,
    test: float,
    cache: str | None,
) -> DataSet:
    """A column of a data set of the hub or a local folder; all three splits are cut from the one named.

    Raises:
        DataError: it cannot be loaded, or lacks the split or column.
    """
    try:
        import datasets

        loaded: Any = datasets.load_dataset(path, name, split=split)
        texts: Iterable[str] = (f"{row}\n" for row in loaded[column])
        fingerprint = f"{loaded._fingerprint}/{column}"
    except ImportError as error:
        raise DataError(f"data.source=hf_text needs the extra packages of dbtrain[hub] ({error})") from error
    except Exception as error:
        raise DataError(
            f"data.path={path!r} cannot be read as a Hugging Face data set with split {split!r} and column "
            f"{column!r}: {first_line(error)}"
        ) from error
    return _data_set(texts, fingerprint, tokenizer, length, validation, test, cache)


def _data_set(
    texts: Iterable[str],
    content: str,
    tokenizer: str,
    length: int,
    validation: float,
    test: float,
    cache: str | None,
) -> DataSet:
    chosen = load_tokenizer(tokenizer)
    packed = pack(texts, chosen, cache_folder(cache), content_key(content, chosen.identity))
    return token_data_set(packed, chosen, length, validation, test)


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted([*path.glob("**/*.txt"), *path.glob("**/*.txt.gz")])
    if not files:
        raise DataError(f"data.path={str(path)!r} is no file, and no folder with .txt or .txt.gz files")
    return files


def _lines(file: Path) -> Iterator[str]:
    """Pieces of about `CHUNK` characters, each ending at the end of a line."""
    with file.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(file, "rt", encoding="utf-8", errors="replace") as text:
            while lines := text.readlines(CHUNK):
                piece = "".join(lines)
                yield piece if piece.endswith("\n") else f"{piece}\n"
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is damaged ({error}): fetch it again") from error
