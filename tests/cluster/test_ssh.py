"""The launcher for hosts that are reached by SSH: real SSH daemons, on hosts with networks of their own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.cluster.hosts import GCS_PORT, Network
from tests.conftest import ROOT, RUN, STEPS, events, shards, wait_for

DESK, HEAD, WORKERS = "desk", "head", ("ada", "bob", "cyd")
SSHD = "/usr/sbin/sshd"
SMALL = "--object-store-memory=100000000 --temp-dir=/run/ray --num-gpus=0"
DAEMON = """
ListenAddress 0.0.0.0
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
SetEnv HOME=/run TMPDIR=/run/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={root} OMP_NUM_THREADS=1
"""
CLIENT = "-F none -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"

pytestmark = [pytest.mark.cluster, pytest.mark.ssh, pytest.mark.timeout(600)]


class Site:
    """A desk, from which the commands are typed, and four hosts that it reaches by SSH."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "sshd_config").write_text(DAEMON.format(folder=folder, root=ROOT))
        for name in (HEAD, *WORKERS):
            daemon = f"mkdir -p /run/sshd; exec {SSHD} -D -e -f {folder}/sshd_config"
            network.start(name, ["bash", "-c", daemon], folder / f"sshd-{name}.log")
        self.client = f"ssh {CLIENT.format(folder=folder)}"
        wait_for(lambda: all(self.desk(f"{self.client} {h} true")[0] == 0 for h in (HEAD, *WORKERS)), 120, "SSH")

    def desk(self, line: str, seconds: float = 240, **variables: str) -> tuple[int, str]:
        """Type a line at the desk; its code and what it printed."""
        log = self.folder / f"desk-{time.monotonic_ns()}.log"
        program = self.network.start(DESK, ["bash", "-c", line], log, NO_COLOR="1", COLUMNS="200", **variables)
        return program.wait(seconds), program.output()

    def launcher(self, arguments: str) -> tuple[int, str]:
        """launchers/ssh/cluster.sh."""
        return self.desk(
            f"{ROOT}/launchers/ssh/cluster.sh {arguments}",
            DBTRAIN_SSH=self.client,
            DBTRAIN_BIN=str(Path(sys.executable).parent),
            DBTRAIN_HEAD_OPTIONS=f"{SMALL} --num-cpus=0",
            DBTRAIN_WORKER_OPTIONS=f"{SMALL} --num-cpus=1",
        )

    def dbtrain(self, arguments: str) -> tuple[int, str]:
        """A command on the head, by SSH."""
        command = f"RAY_AUTH_MODE=token {sys.executable} -m dbtrain {arguments}"
        return self.desk(f"{self.client} {HEAD} '{command}'")

    def ray(self) -> list[str]:
        """Command lines of Ray, on all hosts."""
        found = [line for name in (HEAD, *WORKERS) for line in self.network.hosts[name].processes().values()]
        return [line for line in found if "ray" in line and "sshd" not in line]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    reason = hosts.missing() or (None if shutil.which(SSHD) else f"{SSHD} not found: install openssh-server")
    if reason:
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with Network([DESK, HEAD, *WORKERS], {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}) as network:
        yield Site(network, tmp_path)


def test_a_cluster_by_ssh_trains_and_leaves_nothing(site: Site, tmp_path: Path, expected: dict[str, bytes]) -> None:
    code, said = site.launcher(f"up {HEAD} ada")
    assert code == 0 and "a cluster of 2" in said, said
    code, said = site.launcher(f"join {HEAD} bob cyd")
    assert code == 0 and "2 more" in said, said
    address = f"--address {site.network.addresses[HEAD]}:{GCS_PORT}"
    code, said = site.dbtrain(f"doctor {address} --nodes 4 --storage {tmp_path}/runs")
    assert code == 0, said
    start = time.time()
    code, said = site.dbtrain(f"train {' '.join(RUN)} out={tmp_path}/runs cluster.device=cpu {address}")
    assert code == 0 and "merged 3 block(s)" in said, said
    run = tmp_path / "runs" / "run"
    assert shards(run, STEPS) == expected
    told = [event for block in range(3) for event in events(run, block)]
    assert {event["host"] for event in told if event["event"] == "start"} == set(WORKERS)
    print(f"first step {min(e['t'] for e in told if e['event'] == 'step') - start:.1f} s after the command")
    token = site.desk("cat ~/.ray/auth_token")[1].strip()
    assert len(token) == 64 and site.ray() and not [line for line in site.ray() if token in line]
    modes = site.desk("; ".join(f"{site.client} {h} stat -c %a '~/.ray/auth_token'" for h in (HEAD, *WORKERS)))[1]
    assert modes.split() == ["600"] * 4
    code, said = site.launcher(f"down {HEAD} {' '.join(WORKERS)}")
    assert code == 0 and said.count("processes ended") == 4, said
    wait_for(lambda: not site.ray(), 120, "the end of Ray everywhere")
    code, said = site.launcher(f"down {HEAD} {' '.join(WORKERS)}")
    assert code == 0 and said.count("nothing that `up` started runs") == 4, said
