"""A packed file comes from another place: what it may not hold is refused by name before anything is written."""

import hashlib
import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.errors import ShardError
from dbtrain.run.gather import gather
from dbtrain.run.pack import pack
from dbtrain.shards.checksummed_json import seal
from dbtrain.shards.commit import Commit, FileRecord, dump_commit
from dbtrain.shards.copies import CheckpointCopy, adopt
from dbtrain.shards.format import encode
from dbtrain.shards.packed_file import MAGIC, Entry, PackedFile, is_packed, write_packed
from dbtrain.shards.shard_head import read_head
from dbtrain.shards.storage.store import Store
from tests.unit.run.carried import commit, copied, sealed


def written(path, entries, magic=MAGIC, **header):
    """A packed file of (name, content) pairs as a program of somebody else's might write it."""
    rows = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}
        for name, data, more in entries
    ]
    head = seal({"kind": "packed", "entries": rows, **header}, 1, "w")
    path.write_bytes(magic + len(head).to_bytes(8, "little") + head + b"".join(data for _, data, _ in entries))
    return path


@pytest.fixture
def home(tmp_path):
    return sealed(tmp_path / "home")


@pytest.fixture
def whole(home, tmp_path):
    """A packed file of one block at step 20."""
    there = copied(home, tmp_path / "there")
    commit(there, 0, 20)
    path = tmp_path / "whole.packed"
    pack(there, str(path))
    return path


def contents(path):
    """(name, content, {}) of each entry."""
    packed = PackedFile(Store(path.parent), path.name)
    return [(name, packed.read_part(name, 0, entry.size), {}) for name, entry in packed.entries.items()]


def tree(run):
    return sorted(str(path) for path in run.store.path.rglob("*") if path.name != ".LOCK.json.flock")


def refused(home, path):
    before = tree(home)
    with pytest.raises(ShardError) as caught:
        gather(home, [str(path)])
    assert tree(home) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(whole, home):
    names = [name for name, _, _ in contents(whole)]
    step = "blocks/00/step_00000020"
    assert names == ["run.json", f"{step}/COMMIT.json", *(f"{step}/{r}.safetensors" for r in ("ema", "model", "optim"))]
    assert contents(whole)[0][1] == home.store.read("run.json")
    assert is_packed(Store(whole.parent), whole.name)


def test_the_file_is_the_same_for_the_same_commits_and_its_hash_is_that_of_sha256sum(home, tmp_path):
    there = copied(home, tmp_path / "there")
    commit(there, 0, 20)
    made = [pack(there, str(tmp_path / name)) for name in ("one", "two")]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert made[0].sha256 == hashlib.sha256((tmp_path / "one").read_bytes()).hexdigest() == made[1].sha256


BAD_NAMES = [
    "../outside.json",
    "/etc/passwd",
    "blocks/../../outside.safetensors",
    "blocks/00/step_00000020/../../../model.safetensors",
    "blocks/0/step_00000020/model.safetensors",
    "blocks/00/step_20/model.safetensors",
    "blocks/00/step_00000020/model.safetensors/x",
    "blocks/00/step_00000020/model.pt",
    "blocks/00/step_00000020/model.pkl",
    "blocks/00/step_00000020/model.safetensors\n",
    "blocks/00/step_00000020/evil.py",
    "blocks/00/step_00000020/frozen.safetensors",
    "blocks\\00\\step_00000020\\model.safetensors",
    "blocks/00/OWNER.json",
    "LOCK.json",
    "STOP.json",
    "codebook.safetensors",
    "",
    ".",
    "a\0b",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_a_packed_file_has_no_business_with(home, whole, tmp_path, name):
    bad = written(tmp_path / "bad", [*contents(whole), (name, b"{}", {})])
    assert "and a packed file holds only run.json" in refused(home, bad)
    assert not (tmp_path / "outside.json").exists()


@pytest.mark.parametrize(
    "more", [{"link": "/etc/passwd"}, {"mode": 0o4755}, {"type": "symlink"}, {"size": -1}, {"sha256": "x" * 64}]
)
def test_entries_that_say_more_or_less_than_name_size_and_hash(home, whole, tmp_path, more):
    entries = contents(whole)
    bad = written(tmp_path / "bad", [*entries[:-1], (*entries[-1][:2], more)])
    assert "is damaged" in refused(home, bad)


def test_an_entry_twice(home, whole, tmp_path):
    entries = contents(whole)
    assert "once each" in refused(home, written(tmp_path / "bad", [*entries, entries[-1]]))


@pytest.mark.parametrize("without", range(5))
def test_an_entry_that_is_missing(home, whole, tmp_path, without):
    entries = contents(whole)
    del entries[without]
    said = refused(home, written(tmp_path / "bad", entries))
    assert "is missing, or not what the COMMIT.json beside it says" in said


def test_sizes_beyond_what_the_header_states(home, whole, tmp_path):
    data = whole.read_bytes()
    (tmp_path / "more").write_bytes(data + b"x")
    assert "it has 1 bytes more than its header states" in refused(home, tmp_path / "more")


@pytest.mark.parametrize("left", [0, 1, 8, 15, 16, 100, 2000, -1])
def test_a_file_that_was_cut_off(home, whole, tmp_path, left):
    data = whole.read_bytes()
    cut = data[:left]
    (tmp_path / "cut").write_bytes(cut)
    said = refused(home, tmp_path / "cut")
    assert ("is no packed file" if left < 8 and left != -1 else f"it has {len(cut)} of") in said


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 17 << 20])
def test_a_header_that_claims_to_be_huge_is_not_read(home, whole, tmp_path, size):
    (tmp_path / "huge").write_bytes(MAGIC + size.to_bytes(8, "little") + whole.read_bytes()[16:])
    assert f"a header of {size} bytes is too long" in refused(home, tmp_path / "huge")


def test_json_that_claims_to_be_huge_is_not_read(home, whole, tmp_path):
    entries = contents(whole)
    big = [(name, data + b" " * (17 << 20) if name.endswith("COMMIT.json") else data, {}) for name, data, _ in entries]
    assert "bytes are too many for it" in refused(home, written(tmp_path / "bad", big))


def archive(kind):
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as file:
            file.writestr("run.json", "{}")
    elif kind == "tar":
        with tarfile.open(fileobj=data, mode="w") as file:
            file.addfile(tarfile.TarInfo("../run.json"))
    elif kind == "pickle":
        data.write(pickle.dumps({"a": 1}))
    else:
        torch.save({"a": torch.ones(1)}, data)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "pickle", "torch"])
def test_other_containers(home, tmp_path, kind):
    (tmp_path / "other").write_bytes(archive(kind))
    assert "is no packed file but" in refused(home, tmp_path / "other")


@pytest.mark.parametrize("kind", ["pickle", "torch", "python", "torn"])
def test_what_calls_itself_a_shard_and_is_none(home, whole, tmp_path, kind):
    """With right sizes and hashes all over; nothing is unpickled, and nothing is written."""
    entries = contents(whole)
    evil = {"python": b"import os; os.system(1)" * 9, "torn": entries[3][1][:-8]}.get(kind) or archive(kind)
    record = FileRecord(size=len(evil), sha256=hashlib.sha256(evil).hexdigest())
    name = "blocks/00/step_00000020"
    commit_ = dump_commit(Commit(20, 0.5, 1, {"model.safetensors": record}, 1.0), "w")
    bad = [entries[0], (f"{name}/COMMIT.json", commit_, {}), (f"{name}/model.safetensors", evil, {})]
    said = refused(home, written(tmp_path / "bad", bad))
    assert "block 0" in said and "model.safetensors" in said and "is damaged" in said


def test_a_flipped_bit_anywhere_is_told_and_what_is_here_stays(home, whole, tmp_path):
    commit(home, 0, 10)
    data, size = whole.read_bytes(), whole.stat().st_size
    for place in [9, 20, 700, *range(3000, size, size // 40), size - 1]:
        bad = bytearray(data)
        bad[place] ^= 4
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ShardError) as caught:
            gather(home, [str(tmp_path / "bad")])
        assert "\n" not in str(caught.value)
        newest = home.block(0).checkpoints.newest(lambda line: None)
        assert newest is not None and newest.step == 10
        assert [step for step in home.block(0).checkpoints.steps() if step != 10] == []
    gather(home, [str(whole)])
    assert home.block(0).committed == 20


def test_a_name_that_belongs_to_something_else_is_not_overwritten(home, tmp_path):
    there = copied(home, tmp_path / "there")
    commit(there, 0, 20)
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "thesis.txt", tmp_path):
        with pytest.raises(ShardError, match="exists and is no packed file"):
            pack(there, str(path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_block_that_is_damaged_is_not_packed_and_a_file_of_before_stays(home, tmp_path):
    there, path = copied(home, tmp_path / "there"), tmp_path / "packed"
    commit(there, 0, 20)
    pack(there, str(path))
    before = path.read_bytes()
    commit(there, 0, 30)
    shard = there.store.path / "blocks/00/step_00000030/optim.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="step_00000030/optim.safetensors is damaged: its SHA-256 .*flipped bit"):
        pack(there, str(path))
    assert path.read_bytes() == before and len(os.listdir(tmp_path)) == 3


def test_what_cannot_be_packed(home, tmp_path):
    there = copied(home, tmp_path / "there")
    with pytest.raises(ShardError, match="no block of .* has a checkpoint yet"):
        pack(there, str(tmp_path / "x"))
    commit(there, 0, 20)
    with pytest.raises(ShardError, match="block 1 of .* has no checkpoint yet"):
        pack(there, str(tmp_path / "x"), [0, 1])
    with pytest.raises(ShardError, match="block 0 is at step 20 of 50, and nobody could train it on"):
        pack(there, str(tmp_path / "x"), [0], weights_only=True)
    assert not (tmp_path / "x").exists()


def test_packing_and_taking_need_no_memory_of_the_size_of_a_block(make, tmp_path):
    """96 MiB through less than 40 MiB; the head of a shard is read without its tensors."""
    identity = make.identity()
    data = encode({"blocks.1.stem.w": torch.randn(24 << 20)}, identity, 7, "model")[:]
    source, target = Store(tmp_path / "source"), Store(tmp_path / "target")
    source.write("model.safetensors", data)
    record = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    entry = Entry("blocks/01/step_00000007/model.safetensors", len(data), record["sha256"])
    copy = CheckpointCopy(Commit(7, 0.5, 1, {"model.safetensors": record}, 1.0), "source", source.read_range)
    size = len(data)
    del data
    from dbtrain.shards.checkpoint import Checkpoints

    tracemalloc.start()
    try:
        assert read_head(lambda start, n: source.read_range("model.safetensors", start, n), size, "w")[0] == identity
        write_packed(Store(tmp_path), "packed", {entry: lambda: copy.content("model.safetensors")})
        adopt(copy, target, Checkpoints(target, identity), make.fence)
        adopt(copy, target, Checkpoints(target, identity), make.fence)  # verifies what is there
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert Checkpoints(target, identity).verify(7) == []


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, data, length):
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(MAGIC + length.to_bytes(8, "little") + data)
    with pytest.raises(ShardError) as caught:
        PackedFile(Store(path.parent), path.name)
    assert "\n" not in str(caught.value)
