"""Sources of text: files, Hugging Face datasets, a dictionary that Debian ships,
and Python's own documentation."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbtrain.data.content import file_hash
from dbtrain.data.packed import cache_folder, content_key, pack, token_data_set
from dbtrain.data.splits import DataSet
from dbtrain.data.text_files import JSON_LINES, TEXT, check_is_text, checked_text, find_files, json_rows, pieces
from dbtrain.data.tokenizers import load_tokenizer
from dbtrain.errors import DataError, first_line

GCIDE = "/usr/share/dictd/gcide.dict.dz"
"""Where Debian's package dict-gcide puts the GNU Collaborative International Dictionary of English."""

FILE_KINDS: Mapping[str, str] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}
"""What `datasets` calls the format of a single file, by the end of its name."""


def text_files(path: str, tokenizer: str, length: int, validation: float, test: float, cache: str | None) -> DataSet:
    """A file, or all ``.txt`` and ``.txt.gz`` files of a folder,
    in the order of their names; UTF-8, gzipped or not.

    Raises:
        DataError: there is no such file, it is damaged, not readable or not UTF-8, or holds too little text.
    """
    files, digest = _found(path, TEXT)
    for file in files:
        check_is_text(file)
    texts = (piece for file in files for piece in pieces(file))
    return _data_set(texts, digest, tokenizer, length, validation, test, cache)


def json_lines(
    path: str, column: str, tokenizer: str, length: int, validation: float, test: float, cache: str | None
) -> DataSet:
    """Files of JSON Lines: a text under the key `column` of the object on each line;
    a new line ends each text.

    Raises:
        DataError: there is no such file, it is damaged or not readable, or a line holds no such text.
    """
    files, digest = _found(path, JSON_LINES)
    texts = (f"{text}\n" for file in files for text in json_rows(file, column))
    return _data_set(texts, f"{digest}/jsonl/{column}", tokenizer, length, validation, test, cache)


def _found(path: str, suffixes: Sequence[str]) -> tuple[list[Path], str]:
    """The files of a path, and the hash of what they hold."""
    digest = hashlib.sha256()
    try:
        files = find_files(Path(path), suffixes)
        for file in files:
            digest.update(file_hash(file).encode())
    except OSError as error:
        raise DataError(f"data.path={path!r} cannot be read ({error}): fix its files or their permissions") from error
    return files, digest.hexdigest()


def gcide(path: str | None, tokenizer: str, length: int, validation: float, test: float, cache: str | None) -> DataSet:
    """The dictionary of Debian's dict-gcide; three of its bytes are no UTF-8, and are read as U+FFFD.

    Raises:
        DataError: the package is not installed.
    """
    file = path or GCIDE
    if not Path(file).is_file():
        raise DataError(f"no {file}: install Debian's package dict-gcide, or give its file as data.path")
    files, digest = _found(file, TEXT)
    texts = (piece for file in files for piece in pieces(file, errors="replace"))
    return _data_set(texts, f"{digest}/replace", tokenizer, length, validation, test, cache)


def python_topics(tokenizer: str, length: int, validation: float, test: float, cache: str | None) -> DataSet:
    """The language reference that comes with Python (half a million characters;
    differs between its versions)."""
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
    """A column of a data set of the hub, a local folder or a file;
    all three splits are cut from the one named.

    Raises:
        DataError: it cannot be loaded, lacks the split or column, or a row of it holds no text.
    """
    loaded = _loaded(path, name, split)
    if column not in loaded.column_names:
        raise DataError(
            f"data.path={path!r} has no column {column!r} in split {split!r}: set data.column to one of its columns "
            f"({', '.join(map(repr, loaded.column_names))})"
        )
    texts = (f"{text}\n" for text in _rows(loaded, column, f"data.path={path!r}, split {split!r}"))
    return _data_set(texts, f"{loaded._fingerprint}/{column}", tokenizer, length, validation, test, cache)


def _loaded(path: str, name: str | None, split: str) -> Any:
    try:
        import datasets

        if not Path(path).is_file():
            return datasets.load_dataset(path, name, split=split)
        kind = FILE_KINDS.get(Path(path).suffix.lower())
        if kind is None:
            raise DataError(f"data.path={path!r}: a single file is one of {', '.join(FILE_KINDS)}; or give a folder")
        return datasets.load_dataset(kind, name, data_files={split: path}, split=split)
    except ImportError as error:
        raise DataError(
            f"data.source=hf_text needs the extra packages of dbtrain[hub] ({error}): install them"
        ) from error
    except DataError:
        raise
    except Exception as error:
        # `datasets` says of what it cannot parse only that an error occurred
        reason = ": ".join(first_line(part) for part in (error, error.__cause__) if part)
        raise DataError(
            f"data.path={path!r} cannot be read as a Hugging Face data set with split {split!r}: {reason}"
        ) from error


def _rows(loaded: Any, column: str, where: str) -> Iterator[str]:
    for number, value in enumerate(loaded[column]):
        yield checked_text(value, f"{where}, row {number} (the first is 0), column {column!r}")


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
