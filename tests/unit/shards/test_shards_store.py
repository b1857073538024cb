import errno
import os
import threading

import pytest

from dbtrain.errors import ShardError
from dbtrain.shards.storage import content, local, remote
from dbtrain.shards.storage import local as exchange_module
from dbtrain.shards.storage.content import Content
from dbtrain.shards.storage.errors import MissingError
from dbtrain.shards.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "a") if request.param == "local" else Store(f"memory://{tmp_path.name}")


def test_write_read_list_remove(store):
    child = store.child("x", "y")
    child.write("f", b"one")
    child.write("f", b"two")
    assert child.read("f") == b"two" and child.read_text("f") == "two" and child.size("f") == 3
    assert store.list() == ["x"] and child.list() == ["f"] and store.child("none").list() == []
    assert child.exists("f") and not child.exists("g") and store.exists("x")
    store.remove("x")
    store.remove("x")
    assert not child.exists("f")


def test_missing_file_is_told_apart(store):
    for call in (store.read, store.size, store.read_json):
        with pytest.raises(MissingError, match="f.*does not exist"):
            call("f")
    with pytest.raises(MissingError), store.open_local("f"):
        pass


def test_json(store):
    store.write_json("j", {"b": 1, "a": [1.5]})
    assert store.read_json("j") == {"a": [1.5], "b": 1}
    with pytest.raises(ShardError, match="JSON"):
        store.write_json("j", float("nan"))
    store.write("j", b"{\xff")
    with pytest.raises(ShardError, match="not JSON"):
        store.read_json("j")
    with pytest.raises(ShardError, match="UTF-8"):
        store.read_text("j")


def test_append_and_open_local(store):
    store.append("log", b"a\n")
    store.append("log", b"b\n")
    with store.open_local("log") as path:
        assert path.read_bytes() == b"a\nb\n"


def test_create_is_exclusive(store):
    assert store.create("c", b"1") is True
    assert store.create("c", b"2") is False
    assert store.read("c") == b"1"


def test_a_driver_that_knows_no_parts_gets_a_large_file_through_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PART", 10)
    monkeypatch.setattr(content, "PIECE", 7)
    store = Store(f"memory://{tmp_path.name}/large")
    one, two = (Content([mark * 20, b"", mark * 5], 3, lambda: b"abc") for mark in (b"1", b"2"))
    assert store.create("c", one) and not store.create("c", two)
    assert store.read("c") == one[:] == b"abc" + b"1" * 25
    store.write("c", two)
    assert store.read("c") == two[:]
    with store.reading("c", 20) as file:
        into = bytearray(30)
        assert file.size == 28 and file.readinto(memoryview(into)) == 8 and into.rstrip(b"\0") == b"2" * 8


def test_swap_compares(store):
    assert not store.swap("s", b"1", b"2")
    store.write("s", b"1")
    assert not store.swap("s", b"0", b"2") and store.read("s") == b"1"
    assert store.swap("s", b"1", b"2") and store.read("s") == b"2"
    assert store.swap("s", b"2", None) and not store.exists("s")


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/etc/passwd", "a//b", "a\0b", "./a"])
def test_names_stay_below(store, name):
    with pytest.raises(ShardError, match="not a name below"):
        store.write(name, b"")
    with pytest.raises(ShardError):
        store.child(name)


@pytest.mark.parametrize("links", [True, False])
def test_of_many_creators_one_wins(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    store, wins = Store(tmp_path), []
    gate = threading.Barrier(8)

    def run(number):
        gate.wait()
        if store.create("c", b"%d" % number):
            wins.append(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(wins) == 1 and store.read("c") == b"%d" % wins[0]
    assert store.list() == ["c"] and not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


def test_of_many_swaps_one_wins(tmp_path):
    store, wins = Store(tmp_path), []
    store.write("s", b"old")
    gate = threading.Barrier(8)

    def run(number):
        gate.wait()
        if store.swap("s", b"old", b"%d" % number):
            wins.append(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(wins) == 1


def test_copy_links_and_falls_back_to_a_copy(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("a/f", b"data")
    store.copy("a/f", "b/f")
    assert os.stat(tmp_path / "a/f").st_ino == os.stat(tmp_path / "b/f").st_ino
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EXDEV, "other disk")))
    store.copy("a/f", "c/f")
    assert store.read("c/f") == b"data" and os.stat(tmp_path / "a/f").st_ino != os.stat(tmp_path / "c/f").st_ino


@pytest.mark.parametrize("exchanges", [True, False])
def test_move_replaces_a_directory_of_a_child_store(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(local, "exchange", lambda one, two: False)
    store = Store(tmp_path).child("deep")
    store.write("new/f", b"new")
    store.write("old/f", b"old")
    store.write("old/g", b"old")
    store.move("new", "old")
    assert store.list() == ["old"] and store.child("old").list() == ["f"] and store.read("old/f") == b"new"
    assert [n for n in os.listdir(tmp_path / "deep") if n.startswith(".")] == []


def test_exchange_is_real(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange_module.exchange(tmp_path / "a", tmp_path / "b"):
        assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]


def test_move_is_refused_remotely():
    with pytest.raises(ShardError, match="cannot rename"):
        Store("memory://m").move("a", "b")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "file system is read-only"),
        (errno.EFBIG, "file size limit"),
        (errno.EIO, "does not answer"),
    ],
)
def test_errors_name_path_and_mend(tmp_path, monkeypatch, code, words):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    store = Store(tmp_path)
    store.write("f", b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ShardError, match=words) as caught:
        store.write("f", b"new")
    assert str(tmp_path / "f") in str(caught.value) and "\n" not in str(caught.value)
    assert store.read("f") == b"old" and os.listdir(tmp_path) == ["f"]


def test_unknown_protocol_and_empty_url():
    for url in ("nosuch://x/y", "", "a\0b"):
        with pytest.raises(ShardError):
            Store(url)


def test_data_is_synced_before_its_name_and_the_name_before_return(tmp_path, monkeypatch):
    events = []

    def traced(kind, real):
        def call(*args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if kind == "fsync" else str(args[0])
            events.append((kind, os.path.basename(path)))
            return real(*args, **kwargs)

        return call

    for kind in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, kind, traced(kind, getattr(os, kind)))
    store = Store(tmp_path / "run")
    store.makedirs()
    for write, rename in ((store.write, "replace"), (store.create, "link")):
        events.clear()
        write(f"f-{rename}", b"x")
        temporary = events[0][1]
        assert temporary.endswith(".tmp")
        assert events == [("fsync", temporary), (rename, temporary), ("fsync", "run")]
