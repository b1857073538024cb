"""A whole run on an object store: a real S3 protocol server (moto's), a worker killed, the shards equal."""

import os
from collections.abc import Callable, Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from dbtrain.shards.store import Store
from tests.conftest import ROOT, TINY, Command

CONFIG = str(ROOT / "configs" / "vit_digits.yaml")

pytestmark = [pytest.mark.fault, pytest.mark.cluster]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    yield "s3://runs"
    server.stop()


def test_a_run_on_s3_with_a_killed_worker(bucket: str, dbtrain: Callable[..., Command]) -> None:
    small = [*TINY, "blocks=1", "training.steps=20", "cluster.max_crashes=1"]
    faults = [{"block": 0, "step": 13, "kind": "kill"}]
    remote = dbtrain("train", CONFIG, "name=run", f"out={bucket}", *small, faults=faults)
    assert remote.wait() == 0, remote.output()
    local = dbtrain("train", CONFIG, "name=run", *small)
    assert local.wait() == 0, local.output()
    here, there = Store(str(local.folder / "runs" / "run")), Store(f"{bucket}/run")
    for name in ("model", "ema", "optim"):
        file = f"blocks/00/step_00000020/{name}.safetensors"
        assert here.read(file) == there.read(file)
    assert dbtrain("eval", f"{bucket}/run").wait() == 0
