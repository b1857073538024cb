"""The local launcher: two real clusters on one machine, of which one is ended."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dbtrain.coordinator.ray.settings import LOOPBACK
from tests.cluster.test_address import free_ports
from tests.conftest import ROOT, wait_for

LOCAL = ROOT / "launchers" / "local" / "cluster.sh"

pytestmark = pytest.mark.cluster


class Desk:
    """A shell with a home and a temporary folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DBTRAIN_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**kept, **LOOPBACK, "PATH": path, "HOME": str(home), "TMPDIR": str(home)}
        self.ports = {name: free_ports(4) for name in ("one", "two")}

    def launcher(self, what: str, name: str) -> subprocess.CompletedProcess[str]:
        gcs, dashboard, client, agent = self.ports[name]
        options = (
            f"--num-cpus=1 --object-store-memory=100000000 --dashboard-port={dashboard} "
            f"--ray-client-server-port={client} --dashboard-agent-listen-port={agent}"
        )
        variables = {"DBTRAIN_PORT": str(gcs), "DBTRAIN_HEAD_OPTIONS": options}
        return self.run(f"source {LOCAL} {what}", **variables)

    def run(self, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=240)

    def processes(self, name: str) -> list[psutil.Process]:
        """Of a cluster: all that name its address or port, or are below one that does."""
        found, port = {}, self.ports[name][0]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if {f"127.0.0.1:{port}", str(port)} & {word.split("=")[-1] for word in process.cmdline()}:
                    found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        return list(found.values())

    def answers(self, name: str) -> bool:
        """Its register of nodes does, to who knows the token."""
        address = f"127.0.0.1:{self.ports[name][0]}"
        return self.run(f"RAY_AUTH_MODE=token ray status --address {address}").returncode == 0


@pytest.fixture
def desk() -> Iterator[Desk]:
    home = Path(tempfile.mkdtemp(prefix="l"))  # paths of sockets are short
    made = Desk(home)
    yield made
    for process in [*made.processes("one"), *made.processes("two")]:
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(home, ignore_errors=True)


def test_down_ends_its_own_cluster_and_the_other_lives(desk: Desk) -> None:
    for name in ("one", "two"):
        done = desk.launcher("up", name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (desk.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    wait_for(lambda: desk.answers("one") and desk.answers("two"), 180, "their start")
    second = {p for p in desk.processes("two") if p.name() in ("raylet", "gcs_server")}
    assert len(second) == 2
    # the newer one, from a shell that the launcher has not set up: Ray alone would look beyond 127.0.0.1
    doctor = f"{sys.executable} -m dbtrain doctor --address auto --storage {desk.home}/runs"
    done = desk.run(f"env -u {next(iter(LOOPBACK))} {doctor}", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "a run would work here" in done.stdout, done.stdout + done.stderr
    done = desk.launcher("down", "one")
    assert done.returncode == 0 and "processes ended" in done.stdout, done.stdout + done.stderr
    assert desk.processes("one") == [] and second < set(desk.processes("two")) and desk.answers("two")
    next(p for p in second if p.name() == "raylet").kill()  # a crash leaves some behind
    assert desk.launcher("down", "two").returncode == 0 and desk.processes("two") == []
    assert "nothing that `up` started runs" in desk.launcher("down", "two").stdout
