"""Small runs, and an S3 server with a proxy in front that can fail, hang and lose replies."""

import http.client
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import pytest
import torch

from dbtrain.method.content import tensor_hash
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.format import Identity, encode_codebook
from dbtrain.shards.manifest import Manifest, write_manifest
from dbtrain.shards.storage import remote
from dbtrain.shards.storage.store import Store

EDGES = [80.0, 2.0, 0.3, 0.002]


def identity(**changes):
    fields = {
        "run": "toy",
        "block": 1,
        "blocks": 3,
        "layers": (2, 4),
        "levels": ((0.3).hex(), (2.0).hex()),
        "architecture_hash": "c" * 64,
        "codebook_hash": "",
    }
    return Identity(**{**fields, **changes})


def parts(seed=0, block=1, layers=(2, 4), ema=True):
    generator = torch.Generator().manual_seed(seed)
    names = [f"blocks.{block}.stem.w", f"blocks.{block}.head.b", *(f"layers.{i}.qkv.weight" for i in range(*layers))]
    model = {name: torch.randn(3, 4, generator=generator) for name in names}
    optim = {f"exp_avg/{name}": torch.randn(3, 4, generator=generator) for name in names}
    optim |= {f"step/{name}": torch.tensor(float(seed)) for name in names}
    averaged = {"ema": {name: tensor * 0.5 for name, tensor in model.items()}} if ema else {}
    return {"model": model, **averaged, "optim": optim}


def same(one, two):
    """Bitwise equality of parts or of tensors by name."""
    if one.keys() != two.keys():
        return False
    return all(
        same(value, two[key])
        if isinstance(value, dict)
        else value.dtype == two[key].dtype and value.shape == two[key].shape and torch.equal(value, two[key])
        for key, value in one.items()
    )


def no_fence():
    return None


def commit(checkpoints, step, what, **changes):
    return checkpoints.commit(step, what, **{"loss": 0.5, "attempt": 1, "fence": no_fence, **changes})


def make_manifest(codes=None, blocks=3):
    plan = [
        {"block": b, "layers": [2 * b, 2 * b + 2], "levels": [EDGES[b + 1].hex(), EDGES[b].hex()]}
        for b in range(blocks)
    ]
    return {
        "config": {"name": "toy", "lr": 0.001, "training": {"steps": 5}},
        "plan": plan,
        "codebook_hash": "" if codes is None else tensor_hash(codes),
        "versions": {"torch": "2"},
        "noise": {"p_mean": -1.2},
    }


def put_manifest(store, fields):
    """Write the manifest of these fields of run.json; returns it."""
    manifest = Manifest.parse(fields, "run.json")
    write_manifest(store, manifest)
    return manifest


def make_run(store, codes=None, seed=0, steps=(5, 5, 5), ema=True):
    """A run of three blocks, committed; a step of None leaves a block out."""
    manifest = put_manifest(store, make_manifest(codes))
    if codes is not None:
        store.write("codebook.safetensors", encode_codebook(codes))
    written = []
    for block, step in enumerate(steps):
        what = parts(seed + block, block, (2 * block, 2 * block + 2), ema)
        written.append(what)
        if step is not None:
            commit(Checkpoints(store.child("blocks", f"{block:02d}"), manifest.identity(block)), step, what)
    return written


@pytest.fixture
def make():
    return SimpleNamespace(
        identity=identity,
        parts=parts,
        same=same,
        commit=commit,
        manifest=make_manifest,
        put=put_manifest,
        run=make_run,
        fence=no_fence,
    )


class Trouble:
    """How many of the next requests go wrong, and how."""

    def __init__(self, target):
        self.target, self.seen = target, 0
        self.fail = self.hang = self.lose = self.mute = 0
        self.conditional = threading.Lock()
        """S3 decides a conditional put at once; moto looks first, and then replaces what another thread has put."""

    def relay(self, handler):
        self.seen += 1
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0) or 0))
        if self.hang > 0:
            self.hang -= 1
            time.sleep(1.5)
            handler.close_connection = True
            return None
        if self.fail > 0:
            self.fail -= 1
            return handler.answer(500, {}, b"<Error><Code>InternalError</Code><Message>no</Message></Error>")
        headers = dict(handler.headers)
        with self.conditional if {"If-Match", "If-None-Match"} & headers.keys() else nullcontext():
            link = http.client.HTTPConnection(*self.target, timeout=20)
            link.request(handler.command, handler.path, body, headers)
            reply = link.getresponse()
            data = reply.read()
        if self.lose > 0 and handler.command == "PUT":
            self.lose -= 1
            return handler.answer(500, {}, b"<Error><Code>InternalError</Code><Message>lost</Message></Error>")
        return handler.answer(reply.status, dict(reply.getheaders()), data)


@pytest.fixture(scope="session")
def s3_servers():
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    trouble = Trouble(moto.get_host_and_port())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_expect_100(self):
            if trouble.mute > 0:  # says nothing to "Expect: 100-continue"
                trouble.mute -= 1
                time.sleep(20)
                self.close_connection = True
                return False
            return super().handle_expect_100()

        def relay(self):
            trouble.relay(self)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay

        def answer(self, status, headers, data):
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                    self.send_header(key, value)
            length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args):
            return None

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield trouble, f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    moto.stop()


@pytest.fixture
def s3(s3_servers, monkeypatch, request):
    """(store of an empty prefix, trouble)."""
    import s3fs

    trouble, endpoint = s3_servers
    trouble.fail = trouble.hang = trouble.lose = trouble.mute = 0
    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    # Short only where the server is silent on purpose: a busy machine must not fail the others.
    silent = "hang" in request.node.name or "mute" in request.node.name
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 0.7 if silent else 20}})
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.02))
    monkeypatch.setattr(remote, "PUT_LIMIT_S", 0.9 if silent else 30)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = fsspec.filesystem("s3")
    if not fs.exists("bucket"):
        fs.mkdir("bucket")
    yield Store(f"s3://bucket/{request.node.name}"), trouble
    s3fs.S3FileSystem.clear_instance_cache()
