"""The image and the composed services, really built and run."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.docker import Docker, missing
from tests.conftest import RUN, STEPS, events, shards, wait_for

SLOW = [{"block": block, "step": step, "kind": "slow"} for block in range(3) for step in range(21, 25)]
"""Three seconds each: time to kill a container between the commits of steps 20 and 30."""

pytestmark = [pytest.mark.cluster, pytest.mark.docker, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = os.environ.get("DBTRAIN_DOCKER")
    with Docker(Path(folder) if folder else None) as made:
        made.build()
        try:
            yield made
        finally:
            made.compose("down", "-v", "-t", "2")


def test_the_services_survive_a_killed_worker(docker: Docker, expected: dict[str, bytes]) -> None:
    """Trains, merges, evaluates; the killed container comes back by itself; the shards are those of one machine."""
    start = time.monotonic()
    wanted = " ".join(RUN[1:])
    docker.compose("up", "-d", "--scale", "worker=3", DBTRAIN_OVERRIDES=wanted, DBTRAIN_FAULTS=json.dumps(SLOW))
    run = docker.volume("runs") / "run"
    wait_for(lambda: all(seen(run, block, "commit", 20) for block in range(3)), 300, "step 20 of all blocks")
    first = min(event["t"] for block in range(3) for event in events(run, block) if event["event"] == "ready")
    print(f"first step {first - time.time() + time.monotonic() - start:.1f} s after compose up")
    victim = next(event["host"] for event in events(run, 1) if event["event"] == "start")
    before = state(docker, victim)
    os.kill(before["Pid"], signal.SIGKILL)  # and not `docker kill`, which Docker takes for a wish to stop it
    train = docker.compose("ps", "-q", "train").strip()
    code = docker.call("docker", "wait", train, seconds=400).strip()
    log = docker.call("docker", "logs", train)
    assert code == "0", log + docker.compose("logs", "--tail=30")
    assert "merged 3 block(s)" in log and "test accuracy %" in log
    assert shards(run, STEPS) == expected
    assert len(list(run.glob("blocks/01/attempts/*"))) == 2
    after = state(docker, victim)
    assert after["Running"] and after["Pid"] != before["Pid"]

    token = (docker.volume("token") / "token").read_text().strip()
    assert len(token) == 64
    containers = docker.compose("ps", "-q").split()
    shown = docker.compose("logs") + "".join(json.dumps(docker.inspect(name)) for name in containers)
    assert len(containers) == 5 and token not in shown
    for name in containers:
        config: Any = docker.inspect(name)
        assert config["Config"]["User"] == "10001:10001"
        assert config["HostConfig"]["ReadonlyRootfs"] and config["HostConfig"]["CapDrop"] == ["ALL"]
        assert not config["HostConfig"]["PortBindings"] and not config["HostConfig"]["Privileged"]


def test_the_services_with_gpus_are_well_formed(docker: Docker) -> None:
    """Only their form: there is no GPU here."""
    shown = docker.compose("-f", "docker/compose.gpu.yaml", "config")
    assert "nvidia" in shown and "memlock" in shown


def seen(run: Path, block: int, kind: str, step: int) -> bool:
    return any(event["event"] == kind and event["step"] == step for event in events(run, block))


def state(docker: Docker, container: str) -> dict[str, Any]:
    return dict(docker.inspect(container)["State"])  # type: ignore[call-overload]
