"""Text of files and of rows of records is UTF-8 and is text, or is refused by its line or row."""

import gzip
import json

import pytest

from dbtrain.data.registry import load
from dbtrain.data.tokenizers import Bytes, Letters
from dbtrain.errors import DataError
from tests.unit.data.test_data_text import PLAIN, read, stream


def text_of(data):
    return Bytes().decode(stream(data).tolist())


FRENCH = "the caf\u00e9 of the na\u00efve cat\n" * 40


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            ("the cat\n" * 3 + FRENCH).encode("latin-1"),
            "line 4, byte 8: 0xe9 is no UTF-8.*iconv -f WINDOWS-1252 -t UTF-8",
        ),
        (FRENCH.encode("utf-16"), "line 1, byte 1: 0xff is no UTF-8.*iconv -f UTF-16 -t UTF-8"),
        (FRENCH.encode("utf-16-be"), "line 1, byte 16: 0xe9 is no UTF-8.*iconv -f UTF-16 "),
        (b"the cat\nsat\n" * 9 + "the cat\n".encode("utf-16-le") * 40, "line 19: a zero byte.*iconv -f UTF-16"),
        (("\u65e5\u672c\n" * 40).encode("utf-16-le"), "line 1.*iconv"),
        (b"words\n" * 40 + b"\xe6\x97", "line 41, byte 1: 0xe6 is no UTF-8"),
    ],
    ids=["latin-1", "utf-16", "utf-16-be", "utf-16-le", "utf-16-le-japanese", "cut"],
)
def test_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path, name, data, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.txt").write_text("words " * 99)
    (tmp_path / "texts" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=f"texts/{name}.*{message}") as caught:
        read(tmp_path / "texts", tmp_path / "cache")
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").iterdir())


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(FRENCH, encoding="utf-8-sig")
    found = text_of(read(tmp_path, tmp_path / "cache", tokenizer="bytes"))
    assert found.startswith("the caf\u00e9") and "\ufeff" not in found


def test_hidden_files_are_left_out(tmp_path):
    home = tmp_path / ".home" / "texts"
    for name in (".hidden.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "b/.git/c.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("zzz " * 99)
    with pytest.raises(DataError, match="is no file, and no folder with .txt"):
        read(home, tmp_path / "cache")
    for name in ("a.txt", "b/A.TXT"):
        (home / name).write_text("words " * 40)
    found = text_of(read(home, tmp_path / "cache", tokenizer="bytes"))
    assert found.count("words") > 70 and "z" not in found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl", "set data.source=jsonl, and data.column"),
        ("a.NDJSON.gz", "set data.source=jsonl"),
        ("a.csv", "set data.source=hf_text, and data.column"),
        ("a.parquet", "set data.source=hf_text"),
    ],
)
def test_a_file_of_records_is_no_text(tmp_path, name, message):
    (tmp_path / name).write_text("words " * 99)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read(tmp_path / name, tmp_path / "cache")


def test_a_folder_without_text_says_what_it_has(tmp_path):
    (tmp_path / "a.md").write_text("words")
    with pytest.raises(DataError, match=r"no folder with .txt or .txt.gz files \(there are .md\)"):
        read(tmp_path, tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="for those of JSON Lines in it set data.source=jsonl"):
        read(tmp_path, tmp_path / "cache")


def test_the_dictionary_may_have_bytes_that_are_no_utf_8_and_shares_no_cache_with_text(tmp_path):
    (tmp_path / "gcide.dict").write_bytes(b"The market\x92s drop. " * 40)
    data = load("gcide", {**PLAIN, "path": str(tmp_path / "gcide.dict"), "cache": str(tmp_path / "c")})
    assert Letters().decode(stream(data).tolist()).startswith("the market s drop the market")
    with pytest.raises(DataError, match="0x92 is no UTF-8"):
        read(tmp_path / "gcide.dict", tmp_path / "c")


def read_lines(path, cache, **changes):
    return load(
        "jsonl", {**PLAIN, "tokenizer": "bytes", "path": str(path), "cache": str(cache), "column": "text", **changes}
    )


def test_json_lines_are_the_texts_under_a_key(tmp_path):
    rows = [{"id": i, "text": f"caf\u00e9 {i}\ntwo \u2028lines", "body": "no"} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    expected = "".join(f"{row['text']}\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines[:20]) + "\r\n\n").encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:]).encode()))
    (tmp_path / "c.txt").write_text("other text")
    data = read_lines(tmp_path, tmp_path / "cache", length=1)
    assert text_of(data) == expected
    assert text_of(read_lines(tmp_path, tmp_path / "cache", length=1, column="body")) == "no\n" * 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": null}', r"key 'text' holds nothing \(null\), not a text"),
        ('{"text": ["a", "b"]}', r"key 'text' holds \['a', 'b'\] \(list\), not a text"),
        ('{"text": 5}', r"holds 5 \(int\), not a text"),
        ('{"text": {"a": "' + "b" * 99 + '"}}', r"\.\.\. \(dict\), not a text"),
        ('{"text": "\\ud800"}', "half a character"),
        ('{"id": 1, "body": "a"}', r"has no key 'text': set data.column to one of its keys \('id', 'body'\)"),
        ('["text"]', "one object on each line"),
        ('{"text": "a"', "is no JSON"),
        ('{"text": "a"} {"text": "b"}', "is no JSON"),
        ("[" * 99999, "is no JSON"),
        ("9" * 9999, "is no JSON"),
    ],
)
def test_a_line_that_holds_no_text_is_refused_by_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"a.jsonl, line 3.*{message}") as caught:
        read_lines(tmp_path / "a.jsonl", tmp_path / "cache")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_lines_that_are_not_utf_8_or_damaged_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="a.jsonl, line 2, byte 14: 0xe9 is no UTF-8"):
        read_lines(tmp_path, tmp_path / "cache")
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9])
    with pytest.raises(DataError, match="a.jsonl is damaged"):
        read_lines(tmp_path, tmp_path / "cache")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def read_column(path, cache, **changes):
    plain = {**PLAIN, "tokenizer": "bytes", "name": None, "split": "train", "column": "text"}
    return load("hf_text", {**plain, "path": str(path), "cache": str(cache), **changes})


def test_a_column_of_a_file_is_that_of_a_folder_and_of_json_lines(tmp_path, offline):
    import datasets

    rows = [{"n": i, "text": f"caf\u00e9 {i}"} for i in range(60)]
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    for path in (tmp_path / "a.jsonl", tmp_path / "data" / "train.jsonl"):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    paths = [tmp_path / name for name in ("a.parquet", "a.csv", "a.jsonl", "data")]
    contents = {read_column(path, tmp_path / "c").content for path in paths}
    assert contents == {read_lines(tmp_path / "a.jsonl", tmp_path / "c").content}
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(DataError, match=r"a.xls': a single file is one of .parquet, .csv"):
        read_column(tmp_path / "a.xls", tmp_path / "c")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("none", r"row 2 \(the first is 0\), column 'none' holds nothing \(null\), not a text"),
        ("number", r"row 0 .*column 'number' holds 0 \(int\), not a text"),
        ("parts", r"row 0 .*column 'parts' holds \['a'\] \(list\), not a text"),
        ("words", r"no column 'words' in split 'train': .* \('none', 'number', 'parts', 'text'\)"),
    ],
)
def test_a_column_that_holds_no_text_is_refused_by_its_row(tmp_path, offline, column, message):
    rows = [{"none": None if i == 2 else "a", "number": i, "parts": ["a"], "text": "a b c"} for i in range(60)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match=f"data.path=.*data'.*{message}") as caught:
        read_column(tmp_path / "data", tmp_path / "c", column=column)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_cannot_be_parsed_or_lacks_the_split_says_why(tmp_path, offline):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="data' cannot be read .*JSON parse error"):
        read_column(tmp_path / "data", tmp_path / "c")
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"split 'tests'.*\['train'\]"):
        read_column(tmp_path / "data", tmp_path / "c", split="tests")
