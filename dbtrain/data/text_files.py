"""Files of text: which of a folder are read, and their text, which must be UTF-8."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dbtrain.errors import DataError

CHUNK = 1 << 20
"""Characters that are encoded at once; a piece ends at the end of a line."""
TEXT = (".txt", ".txt.gz")
JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".json")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
SHOWN = 8
"""Names that a message lists."""


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or all files of a folder with such an end of their names,
    in order; hidden ones are left out.

    Raises:
        DataError: there is none.
        OSError: a folder cannot be read.
    """
    if path.is_file():
        return [path]
    there = sorted(_visible(path)) if path.exists() else []
    files = [file for file in there if file.name.lower().endswith(tuple(suffixes))]
    if not files:
        raise DataError(
            f"data.path={str(path)!r} is no file, and no folder with {' or '.join(suffixes[:2])} files{_others(there)}"
        )
    return files


def _visible(path: Path) -> Iterator[Path]:
    """What is in a folder, without what editors and systems hide there, such as .ipynb_checkpoints."""
    for folder, folders, files in os.walk(path, onerror=_stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # a folder of such a name is told when it is opened
        yield from (Path(folder) / name for name in (*files, *folders) if not name.startswith("."))


def _stop(error: OSError) -> NoReturn:
    raise error


def _others(there: Sequence[Path]) -> str:
    kinds = sorted({"".join(file.suffixes[-2:]) or file.name for file in there if file.is_file()})
    if any(file.name.lower().endswith(JSON_LINES) for file in there):
        return "; for those of JSON Lines in it set data.source=jsonl"
    return f" (there are {', '.join(kinds[:SHOWN])})" if kinds else ""


def check_is_text(file: Path) -> None:
    """Refuse a file whose name says that it holds records, not text.

    Raises:
        DataError: it does.
    """
    name = file.name.lower()
    if name.endswith(JSON_LINES):
        raise DataError(
            f"{file} is a file of JSON Lines: set data.source=jsonl, and data.column to the key of its text"
        )
    if name.endswith(TABLES):
        raise DataError(
            f"{file} is no text but a table: set data.source=hf_text, and data.column to its column of text"
        )


def pieces(file: Path, errors: str = "strict") -> Iterator[str]:
    """Pieces of about `CHUNK` characters of a file, gzipped or not, each ending at the end of a line.

    Args:
        file: a text file.
        errors: ``replace`` to put U+FFFD where a byte is no UTF-8.

    Raises:
        DataError: it is damaged or cannot be read, or is not UTF-8.
    """
    lines_before = 0
    try:
        # a byte order mark is no part of the text
        with opened(file)(file, "rt", encoding="utf-8-sig", errors=errors) as text:
            while lines := text.readlines(CHUNK):
                piece = "".join(lines)
                if "\0" in piece:
                    line = lines_before + piece[: piece.index("\0")].count("\n") + 1
                    raise DataError(f"{file}, line {line}: a zero byte, which no text holds: {_convert('UTF-16')}")
                lines_before += len(lines)
                yield piece if piece.endswith("\n") else f"{piece}\n"
    except UnicodeDecodeError as error:
        raise not_utf8(file) from error
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(file, error) from error


def opened(file: Path) -> Callable[..., Any]:
    """What opens a file: it is gzipped if its first bytes say so, whatever its name.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return gzip.open if stream.read(2) == b"\x1f\x8b" else open


def damaged(file: Path, error: Exception) -> DataError:
    """What is said of a file that cannot be read to its end."""
    return DataError(f"{file} is damaged or cannot be read ({error}): fetch it again, or fix its permissions")


def not_utf8(file: Path) -> DataError:
    """What is said of a file that is not UTF-8: where, and how to convert it."""
    with opened(file)(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                # half of the bytes of plain English in UTF-16 are zero
                wide = b"\0" in line or (number == 1 and line.startswith(UTF_16))
                return DataError(
                    f"{file}, line {number}, byte {error.start + 1}: 0x{line[error.start]:02x} is no UTF-8, which text "
                    f"must be: {_convert('UTF-16' if wide else 'WINDOWS-1252')}"
                )
    return DataError(f"{file} changes while it is read: leave it alone until its tokens are packed")


def _convert(encoding: str) -> str:
    return f"if it is {encoding}, convert it with `iconv -f {encoding} -t UTF-8`; if it is no text, leave it out"


def json_rows(file: Path, column: str) -> Iterator[str]:
    """The text in each line of a file of JSON Lines, gzipped or not; lines without anything are passed over.

    Raises:
        DataError: the file is damaged or not UTF-8, or a line holds no object with a text under this key.
    """
    try:
        with opened(file)(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _value(line, column, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise not_utf8(file) from error
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(file, error) from error


def _value(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({error}): a file of JSON Lines has one object on each line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} holds {_kind(row)}: a file of JSON Lines has one object on each line")
    if column not in row:
        raise DataError(
            f"{where} has no key {column!r}: set data.column to one of its keys ({', '.join(map(repr, row)) or 'none'})"
        )
    return checked_text(row[column], f"{where}, key {column!r}")


def checked_text(value: Any, where: str) -> str:
    """A text of a row of data as it is trained on, or what is wrong with it.

    Raises:
        DataError: it is not a text, or one that cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} holds {_kind(value)}, not a text: give it a text, or leave the row out of the data")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {value[error.start]!r} is half a character: fix the text, or leave it out"
            ) from error
        value = value.removeprefix("\ufeff")
    return value


def _kind(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing (null)"
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} ({type(value).__name__})"
