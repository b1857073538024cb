"""Files that are read and written in parts, on a disk, in memory and in an object store, and by a plain web server."""

import functools
import http.server
import os
import threading

import pytest

from dbtrain.errors import ShardError
from dbtrain.shards.packed_file import pieces
from dbtrain.shards.storage import remote
from dbtrain.shards.storage.store import Store


class Broken(RuntimeError):
    """What goes wrong while the pieces are made."""


def broken(size):
    yield bytes(size)
    raise Broken


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "a") if request.param == "local" else Store(f"memory://{tmp_path.name}")


def check_parts(store):
    data = bytes(range(256)) * 5
    store.write("f", data)
    assert store.read_range("f", 0, 10) == data[:10] and store.read_range("f", 1000, 33) == data[1000:1033]
    assert store.read_range("f", 1270, 100) == data[1270:]
    assert b"".join(pieces(functools.partial(store.read_range, "f"), len(data))) == data


def test_parts_of_a_file(store):
    check_parts(store)


def test_a_stream_is_written_whole(store):
    store.write_stream("x/f", lambda: [b"one", b"", b"two"])
    assert store.read("x/f") == b"onetwo" and store.child("x").list(temporaries=True) == ["f"]


def test_a_stream_that_breaks_leaves_a_file_on_a_disk_as_it_was(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(Broken):
        store.write_stream("f", lambda: broken(10))
    assert store.list(temporaries=True) == []
    store.write("f", b"before")
    with pytest.raises(Broken):
        store.write_stream("f", lambda: broken(10))
    assert store.read("f") == b"before" and store.list(temporaries=True) == ["f"]


def test_streams_and_parts_in_an_object_store(s3, monkeypatch):
    store, trouble = s3
    monkeypatch.setattr(remote, "PART", 5 << 20)
    check_parts(store)
    big = os.urandom(11 << 20)
    store.write_stream("big", lambda: [big[: 7 << 20], big[7 << 20 :]])
    assert store.read("big") == big
    for size in (10, 12 << 20):  # before the first part is sent, and after
        for name in ("none", "big"):
            with pytest.raises(ShardError, match="Broken"):
                store.write_stream(name, functools.partial(broken, size))
    assert not store.exists("none") and store.read("big") == big
    trouble.fail = 1
    store.write_stream("again", lambda: [b"tried ", b"again"])
    assert store.read("again") == b"tried again"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which gives files only whole."""

    def log_message(self, *arguments):
        pass


def test_a_server_that_gives_files_only_whole_is_told(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "f").write_bytes(bytes(1000))
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = Store(f"http://127.0.0.1:{server.server_address[1]}")
        assert store.exists("f") and not store.exists("g")
        with pytest.raises(ShardError, match="is given only whole by its server: download it"):
            store.read_range("f", 0, 16)
        server.shutdown()
