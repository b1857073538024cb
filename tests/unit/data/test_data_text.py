import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.config import load_config
from dbtrain.data.blank import blank
from dbtrain.data.packed import TokenWindows, content_key, pack
from dbtrain.data.registry import load
from dbtrain.data.tokenizers import Bytes, Letters, load_tokenizer
from dbtrain.errors import DataError

CPU = torch.device("cpu")
PLAIN = {"tokenizer": "letters", "length": 8, "validation": 0.1, "test": 0.1}


def read(path, cache, **changes):
    return load("text", {**PLAIN, "path": str(path), "cache": str(cache), **changes})


def test_what_is_called_a_text_and_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "texts" / "a.txt").mkdir(parents=True)
    with pytest.raises(DataError, match=r"data.path=.*texts' cannot be read .*a.txt"):
        read(tmp_path / "texts", tmp_path)


def stream(data):
    """All tokens of the three splits, in the order of the text."""
    splits = (data.train, data.validation, data.test)
    return torch.cat([s.batch(torch.arange(len(s)), CPU)["tokens"].flatten() for s in splits])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The cat -- sat, 3 times.\n", "the cat sat times "),
        ("Café déjà-vu", "cafe deja vu"),
        ("...  a", "a"),
        ("日本 b", "b"),
        ("", ""),
    ],
)
def test_letters_are_27_and_all_else_is_one_space(text, plain):
    tokens = Letters().encode(text)
    assert Letters().decode(tokens.tolist()) == plain
    assert tokens.dtype == np.uint8 and (not len(tokens) or tokens.max() <= 26)


@given(st.text())
def test_bytes_give_every_text_back(text):
    text = text.encode("utf-8", "replace").decode()
    assert Bytes().decode(Bytes().encode(text).tolist()) == text


@given(st.lists(st.text(alphabet="abé .\n", max_size=9), max_size=5))
def test_a_text_cut_at_its_lines_has_the_same_letters(lines):
    pieces = [Letters().encode(line + "\n") for line in lines]
    whole = Letters().encode("".join(line + "\n" for line in lines))
    assert Letters().decode(np.concatenate([*pieces, np.zeros(0, int)]).tolist()) == Letters().decode(whole.tolist())


def bpe(path: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the hat and the mat"] * 9, trainer)
    tokenizer.save(str(path / "tokenizer.json"))


def test_a_hugging_face_tokenizer_by_its_folder_or_file(tmp_path):
    bpe(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        tokens = tokenizer.encode("the cat, naïve")
        assert tokenizer.decode(tokens.tolist()) == "the cat, naïve"
        assert len(tokens) < len("the cat, naïve") and 256 < tokenizer.vocabulary <= 300
    (tmp_path / "a.txt").write_text("the cat and the hat\n" * 50)
    data = read(tmp_path / "a.txt", tmp_path / "cache", tokenizer=str(tmp_path))
    assert data.shape == {"length": 8, "vocabulary": tokenizer.vocabulary}
    assert data.train.text(0).startswith("the cat and the hat")


EMPTY = b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe", EMPTY])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


def test_windows_are_the_text_in_its_order(tmp_path):
    text = "".join(f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)} " for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    data = read(tmp_path / "a.txt", tmp_path / "cache", length=10)
    found = Letters().decode(stream(data).tolist())
    cut = len(data.train) * 10
    assert found[:cut] == text[:cut] and len(found) > 0.99 * len(text)
    assert len(data.validation) == len(data.test) == 60
    assert data.train.batch(torch.tensor([3, 0, 3]), CPU)["tokens"].shape == (3, 10)
    again = data.train.batch(torch.tensor([3]), CPU)["tokens"]
    assert torch.equal(again, data.train.batch(torch.tensor([3, 0]), CPU)["tokens"][:1])
    assert again.dtype == torch.int64 and data.train.text(3) == text[30:40]


def test_a_blank_batch_is_like_a_real_one(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 40)
    data = read(tmp_path, tmp_path / "cache")
    real, made = data.train.batch(torch.arange(3), CPU), blank(data.shape, 3)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


def test_a_folder_is_its_files_by_name_gzipped_or_not(tmp_path):
    (tmp_path / "b.txt").write_text("beta " * 30)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"alpha " * 30))
    (tmp_path / "c.md").write_text("no " * 30)
    found = Letters().decode(stream(read(tmp_path, tmp_path / "cache")).tolist())
    assert found.startswith("alpha alpha") and found.count("beta") > 20 and "no" not in found


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
        (FRENCH.encode("utf-16"), "is UTF-16.*iconv -f UTF-16 -t UTF-8"),
        (FRENCH.encode("utf-16-be"), "line 1.*iconv"),
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


def test_the_cache_is_used_and_follows_the_content(tmp_path):
    (tmp_path / "a.txt").write_text("one two " * 40)
    first, cache = stream(read(tmp_path, tmp_path / "cache")), tmp_path / "cache"
    (packed,) = cache.glob("*.uint8")
    before = packed.stat()
    assert torch.equal(stream(read(tmp_path, cache)), first)
    assert packed.stat().st_mtime_ns == before.st_mtime_ns and packed.stat().st_ino == before.st_ino
    (tmp_path / "a.txt").write_text("one ten " * 40)
    assert not torch.equal(stream(read(tmp_path, cache)), first)
    assert len(list(cache.glob("*.uint8"))) == 2
    read(tmp_path, cache, tokenizer="bytes")
    assert len(list(cache.glob("*.uint8"))) == 3 and not list(cache.glob(".*"))


def test_a_failed_packing_leaves_nothing(tmp_path):
    def broken():
        yield "text "
        raise DataError("stop")

    with pytest.raises(DataError, match="stop"):
        pack(broken(), Letters(), tmp_path, content_key("x"))
    assert not list(tmp_path.iterdir())


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a bit of the tokens": lambda file, kept: flip_a_bit(file),
    "cut short": lambda file, kept: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file, kept: file.write_bytes(file.read_bytes() + b"\1"),
    "empty": lambda file, kept: file.write_bytes(b""),
    "of zeros": lambda file, kept: file.write_bytes(bytes(file.stat().st_size)),
    "no tokens": lambda file, kept: file.unlink(),
    "a bit of the hash": lambda file, kept: flip_a_bit(kept),
    "no hash": lambda file, kept: kept.unlink(),
    "an empty hash": lambda file, kept: kept.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("tokenizer", ["letters", "bpe"])
def test_a_damaged_cache_is_packed_again(tmp_path, damage, tokenizer):
    if tokenizer == "bpe":  # two bytes a token
        bpe(tmp_path)
        tokenizer = str(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"the cat {chr(97 + i % 26)} sat\n" for i in range(90)))
    data = read(tmp_path, tmp_path / "cache", tokenizer=tokenizer)
    content, first = data.content, stream(data)
    del data  # whose tokens lie in the file that is damaged
    (kept,) = (tmp_path / "cache").glob("*.sha256")
    file = kept.with_suffix("")
    whole, known = file.read_bytes(), kept.read_bytes()
    damage(file, kept)
    again = read(tmp_path, tmp_path / "cache", tokenizer=tokenizer)
    assert again.content == content == known.decode() == hashlib.sha256(whole).hexdigest()
    assert torch.equal(stream(again), first)
    assert (file.read_bytes(), kept.read_bytes()) == (whole, known) and not list((tmp_path / "cache").glob(".*"))


def test_the_content_is_that_of_the_tokens_that_are_trained_on(tmp_path):
    first = pack(["a text"], Letters(), tmp_path, "key")
    (file,) = tmp_path.glob("*.uint8")
    file.write_bytes(bytes([1, 2, 3]))
    # even where somebody made the hash anew: run.json knows the other
    (tmp_path / f"{file.name}.sha256").write_text(hashlib.sha256(bytes([1, 2, 3])).hexdigest())
    other = pack([], Letters(), tmp_path, "key")
    assert other.tokens.tolist() == [1, 2, 3] and other.content != first.content


def test_a_token_beyond_the_vocabulary_is_damage_whatever_its_hash(tmp_path):
    first = pack(["a text"], Letters(), tmp_path, "key").content
    (file,) = tmp_path.glob("*.uint8")
    file.write_bytes(bytes([1, 27, 3]))
    (tmp_path / f"{file.name}.sha256").write_text(hashlib.sha256(bytes([1, 27, 3])).hexdigest())
    again = pack(["a text"], Letters(), tmp_path, "key")
    assert Letters().decode(again.tokens.tolist()) == "a text" and again.content == first


@pytest.mark.parametrize("number", [256, -1, 70000])
def test_a_tokenizer_that_gives_a_number_beyond_its_vocabulary_is_refused(tmp_path, number):
    class Wrong(Bytes):
        def encode(self, text):
            return np.array([0, number, 5])

    with pytest.raises(DataError, match=f"gives token {number}, and its vocabulary has the numbers 0 to 255"):
        pack(["x"], Wrong(), tmp_path, "key")
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    pack(["a text"], Letters(), tmp_path, "key")
    (file,) = tmp_path.glob("*.uint8")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dbtrain.data.packed._write", refuse)
    assert len(pack([], Letters(), tmp_path, "key").tokens) == 6  # one that is whole is read
    flip_a_bit(file)
    with pytest.raises(DataError, match=rf"Permission denied.*{file.name} in it is damaged.*set data.cache"):
        pack(["a text"], Letters(), tmp_path, "key")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_others_may_read_the_cache_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        pack(["a text"], Letters(), tmp_path / "cache", "key")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "cache").iterdir()} == {0o666 & ~umask}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("vocabulary", [27, 256, 257, 65536, 65537])
def test_every_token_number_fits_its_file(tmp_path, vocabulary):
    class Fake(Bytes):
        def encode(self, text):
            return np.array([0, self.vocabulary - 1])

    tokenizer = Fake()
    tokenizer.vocabulary = vocabulary
    tokens = pack(["x"], tokenizer, tmp_path, "key").tokens
    assert TokenWindows(tokens, 2, tokenizer).batch(torch.tensor([0]), CPU)["tokens"].tolist() == [[0, vocabulary - 1]]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (lambda p: None, {}, "is no file, and no folder"),
        (lambda p: (p / "a.txt").write_text("123"), {}, "the text is empty"),
        (lambda p: (p / "a.txt").write_text("abc"), {}, "no window of data.length=8"),
        (lambda p: (p / "a.txt").write_bytes(gzip.compress(b"a b" * 999)[:-9]), {}, "a.txt is damaged"),
        (lambda p: (p / "a.txt").write_text("words " * 99), {"tokenizer": "/none"}, "neither letters, bytes, nor"),
        (lambda p: (p / "a.txt").write_text("words " * 99), {"cache": "/proc/none"}, "set data.cache"),
    ],
)
def test_bad_text_is_refused_in_one_line(tmp_path, make, changes, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, changes.pop("cache", tmp_path / "cache"), **changes)
    assert "\n" not in str(caught.value)


def test_pythons_own_reference(tmp_path):
    data = load("python_topics", {**PLAIN, "length": 64, "cache": str(tmp_path)})
    assert len(data.train) > 3000
    text = "".join(data.train.text(i) for i in range(500))
    assert " the " in text and set(text) <= set(" abcdefghijklmnopqrstuvwxyz")


def test_a_missing_dictionary_names_its_package(tmp_path):
    with pytest.raises(DataError, match="dict-gcide"):
        load("gcide", {**PLAIN, "path": str(tmp_path / "none"), "cache": str(tmp_path)})


def test_a_column_of_a_hugging_face_data_set(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("body,n\n" + "the cat sat,1\n" * 60)
    section = {**PLAIN, "path": str(tmp_path / "data"), "name": None, "split": "train", "cache": str(tmp_path / "c")}
    data = load("hf_text", {**section, "column": "body"})
    assert "".join(data.train.text(i) for i in range(3)) == "the cat sat the cat sat "
    assert len(list((tmp_path / "c").glob("*.uint8"))) == 1
    load("hf_text", {**section, "column": "body"})
    assert len(list((tmp_path / "c").glob("*.uint8"))) == 1
    # `datasets` names a folder by its place and dates, and a run by its text
    (tmp_path / "data").rename(tmp_path / "moved")
    section["path"] = str(tmp_path / "moved")
    assert load("hf_text", {**section, "column": "body"}).content == data.content
    (tmp_path / "moved" / "train.csv").write_text("body,n\n" + "the cat ran,1\n" * 60)
    assert load("hf_text", {**section, "column": "body"}).content != data.content
    with pytest.raises(DataError, match=r"no column 'words' in split 'train': .*\('body', 'n'\)") as caught:
        load("hf_text", {**section, "column": "words"})
    assert "\n" not in str(caught.value)


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


def test_the_cache_is_no_part_of_what_determines_the_weights():
    base = {"name": "a", "model": {"arch": "vit"}, "data": {"source": "python_topics"}}
    plain, moved = (load_config(None, o, base=base) for o in ([], ["data.cache=/elsewhere"]))
    assert (
        plain.content_hash() == moved.content_hash() != load_config(None, ["data.length=9"], base=base).content_hash()
    )
