"""A cache of packed tokens is verified when it is read, and others can share it."""

import hashlib
import os

import numpy as np
import pytest
import torch

from dbtrain.data.packed import pack
from dbtrain.data.tokenizers import Bytes, Letters
from dbtrain.errors import DataError
from tests.unit.data.test_data_text import bpe, read, stream


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
