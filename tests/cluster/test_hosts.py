"""Hosts with networks of their own: no block talks to another, and a host that goes away costs only its block."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from dbtrain.coordinator.ray_settings import SETTINGS
from tests.cluster.hosts import GCS_PORT, Network, Program, missing
from tests.conftest import ROOT, TINY, events, shards, wait_for

CONFIG = str(ROOT / "configs" / "vit_digits.yaml")
STEPS = 60
HEAD, WORKERS, SPARE = "head", ("ada", "bob", "cyd"), "dan"
RUN_S = 180.0
SLOW_STEPS = 12
"""Of three seconds each: the blocks train on while a host's loss is found out, which takes Ray about 20 s."""

pytestmark = pytest.mark.cluster

SEND = """
import socket, sys, time
end = time.monotonic() + 10
while True:
    try:
        connection = socket.create_connection((sys.argv[1], 7000), 2)
        break
    except ConnectionRefusedError:
        assert time.monotonic() < end
        time.sleep(0.05)
connection.sendall(bytes(int(sys.argv[2])))
"""
RECEIVE = """
import socket
server = socket.create_server(("", 7000))
server.settimeout(20)
connection = server.accept()[0]
while connection.recv(1 << 16):
    pass
"""


class Cluster:
    """A head without CPUs and three workers with one each, and a spare host where Ray does not run yet."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.launcher("up", WORKERS, 1)

    def launcher(self, part: str, workers: Sequence[str], cpus: int) -> None:
        """launchers/ssh/cluster.sh, with a way into the hosts in the place of ssh."""
        token = self.folder / "token"
        token.write_text(self.network.environment["RAY_AUTH_TOKEN"])
        addresses = [self.network.addresses[name] for name in (HEAD, *workers)]
        small = "--object-store-memory=100000000 --temp-dir=/run/ray --num-gpus=0 --num-cpus"
        done = subprocess.run(
            [ROOT / "launchers" / "ssh" / "cluster.sh", part, *addresses],
            env={
                **os.environ,
                "DBTRAIN_SSH": str(self.network.transport(self.folder / "transport")),
                "DBTRAIN_TOKEN_FILE": str(token),
                "DBTRAIN_BIN": str(Path(sys.executable).parent),
                "DBTRAIN_HEAD_OPTIONS": f"{small}=0",
                "DBTRAIN_WORKER_OPTIONS": f"{small}={cpus}",
            },
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def train(self, out: str, *arguments: str, faults: str = "[]") -> Program:
        """Start the command on the head."""
        address = f"cluster.address={self.network.addresses[HEAD]}:{GCS_PORT}"
        command = [sys.executable, "-m", "dbtrain", "train", CONFIG, "name=run", f"out={self.folder / out}", "blocks=3"]
        return self.network.start(
            HEAD,
            [*command, *TINY, "cluster.device=cpu", "cluster.cpus_per_worker=1", address, *arguments],
            self.folder / f"{out}.log",
            DBTRAIN_FAULTS=faults,
            NO_COLOR="1",
            COLUMNS="200",
        )

    def send(self, sender: str, receiver: str, size: int) -> bool:
        """Send bytes by TCP; whether they arrived."""
        python, log = sys.executable, self.folder / "tcp.log"
        server = self.network.start(receiver, [python, "-c", RECEIVE], log)
        target = self.network.addresses[receiver]
        client = self.network.start(sender, [python, "-c", SEND, target, str(size)], log)
        arrived = client.wait(30) == 0
        if not arrived:
            server.kill()
        return server.wait(30) == 0 and arrived


@pytest.fixture(scope="module")
def requirements() -> None:
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(requirements: None, local: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """After the local run, because that compiles what the hosts then only copy."""
    with Network([HEAD, *WORKERS, SPARE], {**SETTINGS, "PYTHONPATH": str(ROOT)}) as network:
        yield Cluster(network, tmp_path_factory.mktemp("hosts"))


def between_workers(traffic: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Bytes of each pair of workers, also of those that sent none."""
    return {pair: traffic[pair] for pair in permutations([*WORKERS, SPARE], 2)}


def hosts_of(run: Path) -> dict[int, str]:
    """Where each block's newest attempt started."""
    return {
        block: [event["host"] for event in events(run, block) if event["event"] == "start"][-1] for block in range(3)
    }


def attempt_events(run: Path, block: int, attempt: int) -> list[dict[str, Any]]:
    lines = (run / "blocks" / f"{block:02d}" / "attempts" / str(attempt) / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def committed(lines: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in lines if event["event"] == "commit"]


def commits(run: Path, block: int) -> dict[int, dict[str, Any]]:
    return {
        int(path.parent.name.removeprefix("step_")): json.loads(path.read_text())
        for path in sorted(run.glob(f"blocks/{block:02d}/step_*/COMMIT.json"))
    }


def test_blocks_on_three_hosts_send_each_other_no_byte(cluster: Cluster, local: dict[str, bytes]) -> None:
    network = cluster.network
    before = network.traffic.read()
    assert cluster.send("ada", "bob", 1_000_000)
    sent = network.traffic.read() - before
    assert 1_000_000 < sent["ada", "bob"] < 1_200_000  # the counter counts, and no byte twice
    assert sent["ada", "cyd"] == 0

    before = network.traffic.read()
    command = cluster.train("open")
    assert command.wait(RUN_S) == 0, command.output()
    while_training = network.traffic.read() - before

    run = cluster.folder / "open" / "run"
    assert sorted(hosts_of(run).values()) == sorted(WORKERS)
    assert (run / "merged" / "model.safetensors.index.json").exists()
    print(dict(while_training))
    assert all(while_training[name, HEAD] > 1000 for name in WORKERS)
    assert set(between_workers(while_training).values()) == {0}
    assert shards(run, STEPS) == local


def test_workers_that_cannot_reach_each_other_train_the_same_bits(cluster: Cluster, local: dict[str, bytes]) -> None:
    network = cluster.network
    network.isolate([*WORKERS, SPARE], True)
    try:
        assert not cluster.send("ada", "bob", 1000)
        assert cluster.send("ada", HEAD, 1000)
        command = cluster.train("isolated")
        assert command.wait(RUN_S) == 0, command.output()
    finally:
        network.isolate([*WORKERS, SPARE], False)
    run = cluster.folder / "isolated" / "run"
    assert sorted(hosts_of(run).values()) == sorted(WORKERS)
    assert len(local) == 9
    assert shards(run, STEPS) == local


def test_a_host_cut_off_and_one_without_power(cluster: Cluster, local: dict[str, bytes]) -> None:
    """Both blocks come back on the spare host; the third notices nothing; the one cut off commits nothing any more."""
    network = cluster.network
    slow = [{"block": block, "step": step, "kind": "slow"} for block in range(3) for step in range(21, 21 + SLOW_STEPS)]
    command = cluster.train("faults", faults=json.dumps(slow))
    run = cluster.folder / "faults" / "run"
    wait_for(
        lambda: command.over or all(20 in committed(events(run, block)) for block in range(3)), RUN_S, "step 20 of all"
    )
    assert not command.over, command.output()
    cluster.launcher("join", [SPARE], 2)
    placed = hosts_of(run)
    cut, dark, well = range(3)
    first = {block: events(run, block)[0]["pid"] for block in range(3)}
    assert first[cut] in network.hosts[placed[cut]].processes()

    network.plug(placed[cut], False)
    network.hosts[placed[dark]].power_off()
    fault = time.time()
    assert command.wait(RUN_S) == 0, command.output()
    assert hosts_of(run) == {cut: SPARE, dark: SPARE, well: placed[well]}
    for block in (cut, dark):
        ready = [event["t"] for event in events(run, block) if event["event"] == "ready"]
        print(f"block {block}: {ready[-1] - fault:.1f} s from the fault to its next step")

    network.plug(placed[cut], True)
    wait_for(lambda: first[cut] not in network.hosts[placed[cut]].processes(), 60, "the end of the worker cut off")
    for block in (cut, dark):
        old, new = (attempt_events(run, block, attempt) for attempt in (1, 2))
        start = new[0]["t"]
        resumed = next(event["step"] for event in new if event["event"] == "resumed")
        assert resumed >= 20
        assert all(event["t"] < start for event in old if event["event"] == "commit")
        for step, commit in commits(run, block).items():
            assert commit["attempt"] == (1 if step <= resumed else 2)
            assert commit["attempt"] == 2 or commit["time"] < start
        assert [event["step"] for event in new if event["event"] == "commit"] == list(
            range(resumed + 10, STEPS + 1, 10)
        )
    assert {event["event"] for event in events(run, well)} == {"start", "ready", "step", "commit", "end"}
    assert [event["step"] for event in events(run, well) if event["event"] == "step"] == list(range(5, STEPS + 1, 5))
    assert shards(run, STEPS) == local
