"""A Ray cluster on hosts with networks of their own, and what its runs left in their events."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.hosts import GCS_PORT, Network, Program
from tests.conftest import CONFIG, TINY, events, wait_for

HEAD, WORKERS, SPARE = "head", ("ada", "bob", "cyd"), "dan"
RUN_S = 360.0

SEND = """
import socket, sys, time
end = time.monotonic() + 60
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


class Machines:
    """A head without CPUs and three workers with one each, and a spare host where Ray does not run yet."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.start_all([(HEAD, 0), *((name, 1) for name in WORKERS)])

    def start_all(self, cpus: Sequence[tuple[str, int]]) -> None:
        """Start Ray, first on the head, which stands first."""
        for part in (cpus[:1], cpus[1:]):
            for program in [self.start_ray(name, number) for name, number in part]:
                assert program.wait(300) == 0, program.output()

    def start_ray(self, name: str, cpus: int) -> Program:
        return self.network.start_ray(name, cpus, HEAD, self.folder / f"ray-{name}.log")

    def stop_ray(self, names: Sequence[str]) -> None:
        stop = [str(Path(sys.executable).parent / "ray"), "stop", "--force"]
        for program in [self.network.start(name, stop, self.folder / f"stop-{name}.log") for name in names]:
            assert program.wait(300) == 0, program.output()

    def sigkill(self, name: str, program: str) -> None:
        """Kill a program of Ray on a host, by the name of its file."""
        found = [pid for pid, line in self.network.hosts[name].processes().items() if f"/{program} " in line[:300]]
        assert len(found) == 1, found
        killed = self.network.start(name, ["kill", "-9", str(found[0])], self.folder / "kill.log")
        assert killed.wait(120) == 0
        wait_for(lambda: found[0] not in self.network.hosts[name].processes(), 60, f"the end of {program}")

    def train(self, out: str, *arguments: str, faults: str = "[]") -> Program:
        """Start the command on the head."""
        address = f"cluster.address={self.network.addresses[HEAD]}:{GCS_PORT}"
        command = [sys.executable, "-m", "dbtrain", "train", CONFIG, "name=run", f"out={self.folder / out}", "blocks=3"]
        return self.network.start(
            HEAD,
            [*command, *TINY, "cluster.device=cpu", "cluster.cpus_per_worker=1", address, *arguments],
            self.folder / f"{out}-{len(list(self.folder.iterdir()))}.log",
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
        arrived = client.wait(120) == 0
        if not arrived:
            server.kill()
        return server.wait(120) == 0 and arrived


def hosts_of(run: Path) -> dict[int, str]:
    """Where each block's newest attempt started."""
    return {
        block: [event["host"] for event in events(run, block) if event["event"] == "start"][-1] for block in range(3)
    }


def attempt_events(run: Path, block: int, attempt: int) -> list[dict[str, Any]]:
    """Events of one attempt; none if it has said nothing yet."""
    path = run / "blocks" / f"{block:02d}" / "attempts" / str(attempt) / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_of(lines: list[dict[str, Any]], event: str) -> list[int]:
    """The steps that the events of a kind name."""
    return [line["step"] for line in lines if line["event"] == event]
