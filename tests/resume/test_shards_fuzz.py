"""Thousands of damaged shards, commits, manifests, locks and merged models: one-line errors, never wrong tensors."""

import random
import sys
from pathlib import Path

import pytest
import torch

from dbtrain.errors import ShardError
from dbtrain.run.merge import merge
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.format import decode, decode_codebook, encode, encode_codebook
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.fence import check, claim
from dbtrain.shards.storage.lock import LOCK, RunLock
from dbtrain.shards.storage.store import Store

pytestmark = pytest.mark.fault

TRIALS = 1500


@pytest.fixture(scope="module")
def make():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "shards"))
    try:
        import conftest
    finally:
        sys.path.pop(0)
    return conftest


def mutate(data, dice):
    """Flip, cut, insert, repeat, swap or overwrite, one to three times."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        place, other = dice.randrange(len(out) + 1), dice.randrange(len(out) + 1)
        low, high = sorted((place, other))
        kind = dice.randrange(7)
        if kind == 0 and out:
            out[place % len(out)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del out[low : min(high, low + 40)]
        elif kind == 2:
            out[place:place] = dice.randbytes(dice.randint(1, 30))
        elif kind == 3:
            out[place:place] = out[low : min(high, low + 60)]
        elif kind == 4:
            out[low : low + 8] = dice.choice(
                [b"\xff" * 8, b"\0" * 8, b"1e999999", b"[[[[[[[[", b'"a":null', b"-1      "]
            )
        elif kind == 5:
            digits = [i for i, byte in enumerate(out) if chr(byte).isdigit()]
            if digits:
                out[dice.choice(digits)] = ord(str(dice.randrange(10)))
        else:
            out = out[: dice.randrange(len(out) + 1)]
    return bytes(out)


def survey(data, read, expected, seed, trials=TRIALS):
    """Read mutants; the number refused. Whatever is not refused must be exactly what was written."""
    dice, refused, done = random.Random(seed), 0, 0
    while done < trials:
        bad = mutate(data, dice)
        if bad == data:
            continue
        done += 1
        try:
            found = read(bad)
        except ShardError as err:
            refused += 1
            assert "\n" not in str(err) and 10 < len(str(err)) < 1500
            continue
        assert expected(found), f"wrong content from {bad!r}"
    return refused


def test_shards(make):
    tensors = make.parts(3)["model"]
    data = encode(tensors, make.identity(), 7, "model")[:]

    def whole(shard):
        return (
            make.same(shard.tensors, tensors)
            and (shard.step, shard.role) == (7, "model")
            and (shard.identity == make.identity())
        )

    assert survey(data, lambda bad: decode(bad, where="w"), whole, 1, 3 * TRIALS) > 2.9 * TRIALS


def test_codebooks():
    codes = torch.randn(6, 3)
    data = encode_codebook(codes)
    assert survey(data, lambda bad: decode_codebook(bad, "w"), lambda found: torch.equal(found, codes), 2) > 1400


def test_commits_and_their_files(tmp_path, make):
    checkpoints, store = Checkpoints(Store(tmp_path), make.identity()), Store(tmp_path)
    make.commit(checkpoints, 10, make.parts(1))
    make.commit(checkpoints, 20, make.parts(2))
    for name in ("COMMIT.json", "model.safetensors", "optim.safetensors"):
        path = f"step_00000020/{name}"
        data, skipped = store.read(path), []

        def read(bad, path=path, skipped=skipped):
            (tmp_path / path).write_bytes(bad)
            found = checkpoints.newest(skipped.append)
            assert bool(checkpoints.verify(20)) == (found.step == 10)
            return found

        def whole(found):
            return make.same(found.parts, make.parts(found.step // 10)) and found.commit.loss == 0.5

        survey(data, read, whole, 3, 500)
        assert len(skipped) > 480 and all("\n" not in line for line in skipped)
        store.write(path, data)
    assert checkpoints.newest().step == 20


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "merged/config.json",
        "merged/model.safetensors.index.json",
        "merged/model-00002-of-00003.safetensors",
    ],
)
def test_manifests_and_merged_models(tmp_path, make, name):
    store = Store(tmp_path)
    written = make.make_run(store)
    merge(Run(store))
    merged, manifest = store.child("merged"), read_manifest(store)
    whole_model = MergedDirectory(merged)
    config = whole_model.manifest, whole_model.blocks, whole_model.files
    data = store.read(name)
    (tmp_path / name).unlink()  # a link to a checkpoint otherwise

    def read(bad):
        (tmp_path / name).write_bytes(bad)
        found = MergedDirectory(merged)
        return read_manifest(store), (found.manifest, found.blocks, found.files), found.block(1)

    def whole(found):
        return found[0] == manifest and found[1] == config and make.same(found[2], written[1]["ema"])

    assert survey(data, read, whole, 4) > 0.95 * TRIALS


def test_locks_and_owners(tmp_path):
    store = Store(tmp_path)
    claim(store, 3, "mine")
    owner = store.read("OWNER.json")

    def read_owner(bad):
        (tmp_path / "OWNER.json").write_bytes(bad)
        check(store, "mine")
        claim(store, 3, "mine")
        return True

    assert survey(owner, read_owner, bool, 5) > 0.95 * TRIALS
    with RunLock(store, "a"):
        lock = store.read(LOCK)

    def read_lock(bad):
        (tmp_path / LOCK).write_bytes(bad)
        RunLock(store, "b").acquire()

    from dbtrain.errors import RunLockedError

    def read_locked(bad):
        try:
            read_lock(bad)
        except RunLockedError:
            return True
        return False

    assert survey(lock, read_locked, bool, 6) > 0.9 * TRIALS


def test_manifests_written_from_nonsense(tmp_path, make):
    """Random values in the fields: refused with one line, or read back equal."""
    dice, refused = random.Random(7), 0
    values = [
        None,
        True,
        -1,
        0,
        3,
        2**70,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        [],
        [1],
        [0, 2],
        {},
        {"a": 1},
        ["0x1p0", "0x1p1"],
        [2, 1],
        "0x1p99999",
    ]
    for _ in range(TRIALS):
        manifest = make.make_manifest()
        spots = [(manifest, key) for key in manifest] + [(row, key) for row in manifest["plan"] for key in row]
        for target, key in dice.sample(spots, dice.randint(1, 2)):
            target[key] = dice.choice(values)
        try:
            written = make.put_manifest(Store(tmp_path), manifest)
        except ShardError as err:
            refused += 1
            assert "\n" not in str(err)
        else:
            assert read_manifest(Store(tmp_path)) == written
    assert TRIALS * 0.6 < refused < TRIALS
