import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.config import load_config
from dbtrain.data.batching import blank
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
        (lambda p: None, {"path": "/none #1"}, "'/none #1' is no file, and no folder"),
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
        read(changes.pop("path", tmp_path), changes.pop("cache", tmp_path / "cache"), **changes)
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


def test_the_cache_is_no_part_of_what_determines_the_weights():
    base = {"name": "a", "model": {"arch": "vit"}, "data": {"source": "python_topics"}}
    plain, moved = (load_config(None, o, base=base) for o in ([], ["data.cache=/elsewhere"]))
    assert (
        plain.content_hash() == moved.content_hash() != load_config(None, ["data.length=9"], base=base).content_hash()
    )
