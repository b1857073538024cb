import threading
import time

import pytest
import torch

from dbtrain.errors import FencedError, RunLockedError, ShardError
from dbtrain.run.merge import merge, read_back
from dbtrain.run.newest import merge_newest
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.side_by_side import content_sha256
from dbtrain.shards.storage import remote
from dbtrain.shards.storage.content import Content
from dbtrain.shards.storage.fence import check, claim
from dbtrain.shards.storage.lock import LOCK, RunLock
from dbtrain.shards.storage.store import Store


def test_files(s3):
    store, _ = s3
    store.write("a/f", b"one")
    store.append("a/f", b"two")
    store.write_json("j", {"a": 1})
    assert store.read("a/f") == b"onetwo" and store.size("a/f") == 6 and store.read_json("j") == {"a": 1}
    assert store.list() == ["a", "j"] and store.child("a").list() == ["f"] and store.child("none").list() == []
    with store.open_local("a/f") as path:
        assert path.read_bytes() == b"onetwo"
    assert not path.exists() and not store.is_local
    store.remove("a")
    store.remove("a")
    assert not store.exists("a/f") and store.exists("j")
    with pytest.raises(ShardError, match="s3://.*does not exist"):
        store.read("a/f")


@pytest.mark.parametrize("name", ["a[1]", "a?", "a*", "[ab]1"])
def test_a_name_is_no_pattern(s3, name):
    store, _ = s3
    for file in (f"{name}/f", f"{name}/g/h", "a1/f", "b1/f"):
        store.write(file, b"one")
    store.remove(name)
    store.remove(name)
    assert store.list() == ["a1", "b1"] and store.read("a1/f") == store.read("b1/f") == b"one"


def test_create_and_swap_are_conditional(s3):
    store, _ = s3
    for name, call in (
        ("c", lambda n: store.create("c", b"%d" % n)),
        ("s", lambda n: store.swap("s", b"old", b"%d" % n)),
    ):
        store.write("s", b"old")
        wins, gate = [], threading.Barrier(6)

        def run(number, call=call, wins=wins, gate=gate):
            gate.wait()
            if call(number):
                wins.append(number)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(wins) == 1 and store.read(name) == b"%d" % wins[0]


def test_commit_newest_prune(s3, make):
    store, _ = s3
    checkpoints = Checkpoints(store, make.identity())
    for step in (10, 20, 30):
        make.commit(checkpoints, step, make.parts(step))
    assert checkpoints.steps() == [20, 30] and store.list() == ["step_00000020", "step_00000030"]
    assert make.same(checkpoints.newest().parts, make.parts(30))
    make.commit(checkpoints, 30, make.parts(31))
    assert make.same(checkpoints.newest().parts, make.parts(31))
    store.write("step_00000030/COMMIT.json", b"torn")
    assert make.same(checkpoints.newest(lambda line: None).parts, make.parts(20))


def test_a_large_file_is_uploaded_in_parts_and_read_in_pieces(s3, make, monkeypatch):
    """Parts of 5 MiB, S3's least; the file is no multiple of them, and neither are its tensors."""
    store, trouble = s3
    part = 5 << 20
    monkeypatch.setattr(remote, "PART", part)
    monkeypatch.setattr(remote, "PIECE", 3 << 20)
    cut, seen, largest, relay = Content.__getitem__, [], [], trouble.relay

    def watched(handler):
        seen.append((handler.command, "uploadId" in handler.path, "partNumber" in handler.path))
        largest.append(int(handler.headers.get("Content-Length", 0) or 0))
        relay(handler)

    slices = []
    monkeypatch.setattr(Content, "__getitem__", lambda of, key: slices.append(key) or cut(of, key))
    trouble.relay = watched
    generator = torch.Generator().manual_seed(0)
    sizes = (1_000_003, 7, 2_600_000)
    model = {f"layers.2.w{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    checkpoints = Checkpoints(store, make.identity())
    try:
        make.commit(checkpoints, 10, {"model": model})
        found = checkpoints.newest()
    finally:
        del trouble.relay
    assert make.same(found.parts, {"model": model}) and checkpoints.verify(10) == []
    assert seen.count(("PUT", True, True)) == 3 and ("POST", True, False) in seen
    assert max(largest) <= part + 1000
    assert len(slices) >= 3


def test_of_two_that_create_a_large_file_one_wins(s3, monkeypatch):
    store, trouble = s3
    monkeypatch.setattr(remote, "PART", 5 << 20)
    first, second = (Content([bytes([n]) * (11 << 20)]) for n in (1, 2))
    assert store.create("c", first) and not store.create("c", second)
    assert store.sha256("c") == content_sha256(first)
    trouble.lose = 1  # the first part's reply is lost, and all is sent again
    assert store.create("d", second) and store.sha256("d") == content_sha256(second)


@pytest.mark.parametrize("now", [False, True])
def test_merge_twice(s3, make, now):
    store, _ = s3
    make.run(store, torch.ones(2, 2))
    merge(Run(store))
    written = make.run(store, torch.ones(2, 2), seed=40, steps=(6, 6, 6))
    if now:
        merge_newest(Run(store), lambda of, built: read_back(built))
    else:
        merge(Run(store))
    merged = store.child("merged")
    assert not [name for name in store.list() if name.startswith("merged.building")]
    assert all(make.same(MergedDirectory(merged).block(b), written[b]["ema"]) for b in range(3))
    assert torch.equal(MergedDirectory(merged).codebook(), torch.ones(2, 2)) and len(merged.list()) == 6


def test_lock_and_fence(s3):
    store, _ = s3
    with RunLock(store, "first", ttl_s=0.6):
        time.sleep(0.8)
        with pytest.raises(RunLockedError, match="'first'"):
            RunLock(store, "second").acquire()
    assert not store.exists(LOCK)
    claim(store, 1, "a")
    claim(store, 2, "b")
    check(store, "b")
    with pytest.raises(FencedError, match="attempt 2"):
        check(store, "a")
    with pytest.raises(FencedError):
        claim(store, 1, "a")


@pytest.mark.parametrize(
    "kind",
    ["fail", pytest.param("hang", marks=pytest.mark.fault), pytest.param("mute", marks=pytest.mark.fault)],
)
def test_two_bad_replies_are_survived(s3, make, kind):
    store, trouble = s3
    checkpoints = Checkpoints(store, make.identity())
    setattr(trouble, kind, 2)
    start = time.monotonic()
    make.commit(checkpoints, 10, make.parts(1))
    assert getattr(trouble, kind) == 0 and time.monotonic() - start < 60
    if kind != "mute":  # only puts expect a "100 Continue"
        setattr(trouble, kind, 2)
    assert make.same(checkpoints.newest().parts, make.parts(1)) and getattr(trouble, kind) == 0


@pytest.mark.parametrize("kind", ["fail", pytest.param("hang", marks=pytest.mark.fault)])
def test_a_storage_that_stays_away_is_told_soon_and_is_no_absence(s3, make, kind):
    store, trouble = s3
    checkpoints = Checkpoints(store, make.identity())
    make.commit(checkpoints, 10, make.parts(1))
    setattr(trouble, kind, 10**6)
    for call, at_once in (
        (lambda: checkpoints.newest(lambda line: pytest.fail(line)), 1),
        (lambda: make.commit(checkpoints, 20, make.parts(2)), 3),  # its files are written side by side
        (lambda: store.exists("x"), 1),
    ):
        before, start = trouble.seen, time.monotonic()
        with pytest.raises(ShardError, match="s3://.*(does not answer|AWS_ENDPOINT_URL)") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert trouble.seen - before == 3 * at_once and time.monotonic() - start < 30
    setattr(trouble, kind, 0)
    assert make.same(checkpoints.newest().parts, make.parts(1))


def test_lost_replies(s3, make):
    """The server did it, the client heard 500: a conditional put is repeated and finds its own object."""
    store, trouble = s3
    trouble.lose = 1
    assert store.create("c", b"mine") is True
    store.write("s", b"old")
    trouble.lose = 1
    assert store.swap("s", b"old", b"new") is True
    trouble.lose = 1
    claim(store, 1, "t")
    check(store, "t")
    trouble.lose = 1
    with RunLock(store, "a") as lock:
        lock.check()
    for _ in range(4):
        trouble.lose = 2
        make.commit(Checkpoints(store, make.identity()), 10, make.parts(1))
    assert make.same(Checkpoints(store, make.identity()).newest().parts, make.parts(1))
    assert trouble.lose == 2 or store.child("step_00000010").exists("COMMIT.json")


@pytest.mark.fault
@pytest.mark.parametrize("failures", range(3, 40, 4))
def test_an_outage_at_any_request_of_a_commit(s3, make, failures):
    """Requests from the n-th on fail: the old checkpoint or the new one is there afterwards, whole."""
    store, trouble = s3
    checkpoints = Checkpoints(store, make.identity())
    make.commit(checkpoints, 10, make.parts(1))
    real, count = trouble.relay, iter(range(10**6))

    def relay(handler):
        trouble.fail = 1 if next(count) >= failures else 0
        real(handler)

    trouble.relay = relay
    try:
        make.commit(checkpoints, 20, make.parts(2))
    except ShardError as err:
        assert "\n" not in str(err)
    finally:
        del trouble.relay
        trouble.fail = 0
    found = checkpoints.newest()
    assert make.same(found.parts, make.parts(2) if found.step == 20 else make.parts(1))


def test_missing_bucket_and_credentials(s3, monkeypatch):
    import s3fs

    with pytest.raises(ShardError, match="nosuch.*bucket"):
        Store("s3://nosuch/x").write("f", b"")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ShardError, match="AWS_ACCESS_KEY_ID|credentials"):
        Store("s3://bucket/x").write("f", b"")
