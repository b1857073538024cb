"""A whole run on an object store that fails: a real S3 protocol server (moto's) behind HTTP errors and silence."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from dbtrain.shards.storage.errors import MissingError
from dbtrain.shards.storage.store import Store
from tests.conftest import STEPS, TRAIN, Command

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.long]

READ_TIMEOUT_S = 2
SILENCE_S = 5.0
OUTAGE_S = 12.0
"""Longer than three tries, shorter than what the coordinator waits for."""


class Outages:
    """S3 by moto as a WSGI application, which for some seconds answers 500, or nothing in time, below some paths."""

    def __init__(self) -> None:
        self.application = DomainDispatcherApplication(create_backend_app)
        self.counted: Counter[str] = Counter()
        self._until: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def fail(self, part: str, how: str, seconds: float) -> None:
        """From now on, requests whose path contains `part` get ``500`` or ``silence``."""
        self._until[part] = (how, time.monotonic() + seconds)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        now = time.monotonic()
        for part, (how, until) in list(self._until.items()):
            if part in environ["PATH_INFO"] and now < until:
                with self._lock:
                    self.counted[how] += 1
                if how == "silence":
                    time.sleep(SILENCE_S)
                start_response(
                    "500 Internal Server Error", [("Content-Type", "application/xml"), ("Connection", "close")]
                )
                return [
                    b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
                ]
        return self.application(environ, start_response)


@pytest.fixture
def outages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outages]:
    outages = Outages()
    server = make_server("127.0.0.1", 0, outages, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3": f'{{"config_kwargs": {{"read_timeout": {READ_TIMEOUT_S}, "connect_timeout": {READ_TIMEOUT_S}}}}}',
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="runs")
    yield outages
    server.shutdown()


def test_a_run_on_s3_that_fails_and_falls_silent(
    outages: Outages, dbtrain: Callable[..., Command], expected: dict[str, bytes]
) -> None:
    slow = [{"block": b, "step": step, "kind": "slow"} for b in (1, 2) for step in (22, 23)]
    command = dbtrain(*TRAIN, "out=s3://runs", faults=[{"block": 0, "step": 13, "kind": "kill"}, *slow])
    # from its first commit on, all that a block writes fails for a while; the third has no fault and must not notice
    waiting = {1: "500", 2: "silence"}
    end = time.monotonic() + 200
    while waiting and time.monotonic() < end and command.process.poll() is None:
        for block in [b for b in waiting if committed(b)]:
            outages.fail(f"/blocks/{block:02d}/step_", waiting.pop(block), OUTAGE_S)
            outages.fail("/LOCK.json", "500", 1.0)
        time.sleep(0.2)
    assert command.wait() == 0, command.output()
    assert outages.counted["500"] >= 3
    assert outages.counted["silence"] >= 3, command.output()
    run = Store("s3://runs/run")
    found = {name: run.read(f"blocks/{name[:2]}/step_{STEPS:08d}/{name[3:]}") for name in expected}
    assert found == expected
    attempts = [len(run.child("blocks", f"{block:02d}", "attempts").list()) for block in range(3)]
    # a block whose commit fell into an outage began again; one that only had lines to write may have waited it out
    assert max(attempts) == 2, command.output()
    assert "the storage does not answer" in " ".join(command.output().split())  # lines of the console are cut
    assert "Traceback" not in command.output()
    assert dbtrain("eval", "s3://runs/run").wait() == 0


def committed(block: int) -> bool:
    try:
        return bool(Store(f"s3://runs/run/blocks/{block:02d}/step_00000010").size("COMMIT.json"))
    except MissingError:
        return False
