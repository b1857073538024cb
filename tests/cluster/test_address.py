"""A cluster that somebody else has started, whose nodes have no dbtrain; and what an own cluster shows to others."""

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dbtrain.coordinator.ray.settings import LOOPBACK, SETTINGS
from tests.conftest import ROOT, TINY, Command, events, ray_folder, wait_for
from tests.own_network import write_files

CONFIG = str(ROOT / "configs" / "vit_digits.yaml")
SHORT = [CONFIG, *TINY, "blocks=1", "training.steps=20", "cluster.cpus_per_worker=0.5"]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def free_ports(count: int) -> list[int]:
    """Above those that Ray gives to workers, and below those from which the kernel gives any connection one: of these
    another process could take one before it is used here."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    pytest.fail(f"of 200 ports there are not {count} free")


class SomeCluster:
    """A head on the loopback address, with dashboard and Ray Client, in a Python without dbtrain."""

    def __init__(self, folder: Path) -> None:
        self.gcs, self.dashboard, self.client, agent = free_ports(4)
        self.environment = {
            **os.environ, **SETTINGS, **LOOPBACK, "RAY_TMPDIR": ray_folder(),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }  # fmt: skip
        self.environment.pop("PYTHONPATH", None)
        self.python = self._bare_python(folder / "bare")
        command = [self.python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        options = [
            f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={self.client}",
            # by default the same of every cluster on a machine, and only one of them could start jobs
            f"--dashboard-agent-listen-port={agent}",
            "--dashboard-host=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats",
        ]  # fmt: skip
        with (folder / "head.log").open("wb") as log:
            self.head = subprocess.Popen(
                [*command, *options], env=self.environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: self._listens(self.dashboard) and self._listens(self.client), 300, "the head's start")

    @staticmethod
    def _bare_python(folder: Path) -> str:
        """This environment's packages, less those installed by a path file, which dbtrain is."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        path = folder / "lib" / version / "site-packages" / "all.pth"
        path.write_text(sysconfig.get_paths()["purelib"])
        python = str(folder / "bin" / "python")
        assert subprocess.run([python, "-c", "import ray"], cwd="/", env={}).returncode == 0
        if subprocess.run([python, "-c", "import dbtrain"], cwd="/", env={}, capture_output=True).returncode == 0:
            pytest.fail("dbtrain is installed for good here: the test needs pip install -e")
        return python

    @staticmethod
    def _listens(port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self.head.poll() is not None:
            return
        for process in [*psutil.Process(self.head.pid).children(recursive=True), self.head]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.wait(120)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SomeCluster]:
    made = SomeCluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


def run(cluster: SomeCluster, folder: Path, arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**cluster.environment, "NO_COLOR": "1", "COLUMNS": "200", **variables}
    environment.setdefault("PYTHONPATH", str(ROOT))
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def takes_jobs(cluster: SomeCluster, folder: Path) -> bool:
    """The dashboard listens before it has an agent that starts jobs."""
    address = f"--address=http://127.0.0.1:{cluster.dashboard}"
    process = run(cluster, folder, ["-m", "ray.scripts.scripts", "job", "submit", address, "--no-wait", "--", "true"])
    process.communicate(timeout=240)
    return process.returncode == 0


def test_client_and_submitted_job_train_where_dbtrain_is_not_installed(cluster: SomeCluster, tmp_path: Path) -> None:
    """Both at once; the code travels with them, and what they write is read here."""
    out = f"out={tmp_path}/runs"
    wait_for(lambda: takes_jobs(cluster, tmp_path), 240, "an agent that takes jobs")
    client = run(
        cluster, tmp_path,
        ["-m", "dbtrain", "train", *SHORT, out, "name=client", "--address", f"ray://127.0.0.1:{cluster.client}"],
    )  # fmt: skip
    submit = ["job", "submit", f"--address=http://127.0.0.1:{cluster.dashboard}", f"--working-dir={ROOT}"]
    excludes = {"excludes": ["tests", "docs", ".venv", "runs", ".mypy_cache", ".ruff_cache"]}
    job = run(
        cluster, tmp_path,
        ["-m", "ray.scripts.scripts", *submit, "--runtime-env-json", json.dumps(excludes), "--"]
        + [cluster.python, "-m", "dbtrain", "train", *SHORT, out, "name=job", "--address", "auto"],
    )  # fmt: skip
    lost = run(
        cluster, tmp_path,
        ["-m", "ray.scripts.scripts", *submit, "--runtime-env-json", json.dumps(excludes), "--"]
        + [cluster.python, "-m", "dbtrain", "train", *SHORT, "name=lost", "--address", "auto"],
    )  # fmt: skip
    output = {name: p.communicate(timeout=480)[0] for name, p in (("client", client), ("job", job), ("lost", lost))}
    for name, process in (("client", client), ("job", job)):
        assert process.returncode == 0, output[name]
        assert (tmp_path / "runs" / name / "merged" / "model.safetensors.index.json").exists()
        assert cluster.environment["RAY_AUTH_TOKEN"] not in output[name]
    assert lost.returncode != 0
    assert "a submitted job runs in a copy of its working directory" in " ".join(output["lost"].split())


def test_a_network_of_the_users_goes_along_and_what_it_lacks_there_is_named(
    cluster: SomeCluster, tmp_path: Path
) -> None:
    """Its file lies on this command's path alone; one that imports a file beside it cannot be imported there."""
    nets = tmp_path / "nets"
    nets.mkdir()
    write_files(nets)
    (nets / "beside.py").touch()
    (nets / "lonely.py").write_text("import beside\n" + (nets / "my_net.py").read_text())
    size = ["blocks=1", "training.steps=3", "noise.ranges=uniform", "noise.sigma_min=0.5", "noise.sigma_max=20"]
    command = ["-m", "dbtrain", "train", str(nets / "my_net.yaml"), *size, f"out={tmp_path}/runs"]
    path, client = f"{nets}:{ROOT}", ["--address", f"ray://127.0.0.1:{cluster.client}"]
    whole = run(cluster, tmp_path, [*command, *client], PYTHONPATH=path)
    output = whole.communicate(timeout=240)[0]
    assert whole.returncode == 0 and "merged 1 block(s)" in output, output
    lonely = run(cluster, tmp_path, [*command, "name=lonely", "model.arch=lonely:MyModel", *client], PYTHONPATH=path)
    output = " ".join(lonely.communicate(timeout=240)[0].split())
    assert lonely.returncode != 0 and "ModuleNotFoundError: No module named 'beside'" in output, output
    assert "what belongs together is a package" in output and "Traceback" not in output


def test_other_versions_and_other_plans_are_refused_by_name(cluster: SomeCluster, tmp_path: Path) -> None:
    old = tmp_path / "old" / "torch-2.5.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.0\n")
    address = ["--address", f"127.0.0.1:{cluster.gcs}"]
    command = ["-m", "dbtrain", "train", *SHORT, "out=runs", "name=run", *address]
    torch = run(cluster, tmp_path, command, PYTHONPATH=f"{old.parent}:{ROOT}")
    older = "import ray; ray.__version__ = '2.59.0'; from dbtrain.cli import main; main()"
    ray = run(cluster, tmp_path, ["-c", older, *command[2:], "name=other"])
    doctor = run(cluster, tmp_path, ["-m", "dbtrain", "doctor", "--storage", "runs", "--gpus", "1", *address])
    output = {n: " ".join(p.communicate(timeout=240)[0].split()) for n, p in (("t", torch), ("r", ray), ("d", doctor))}
    assert (torch.returncode, ray.returncode, doctor.returncode) == (1, 1, 1), output
    assert "not 2.5.0: install the same versions everywhere" in output["t"]
    assert "Ray: 2.60.0" in output["r"] and "Ray: 2.59.0" in output["r"]
    assert "1 thing(s) would not work: GPUs" in output["d"] and "planned 1" in output["d"]
    assert not any("Traceback" in text for text in output.values()), output


def listening(pid: int) -> dict[int, set[str]]:
    """Addresses on which a process and all its descendants listen; Ray's daemons are found by their session."""
    session = os.getsid(pid)
    found: dict[int, set[str]] = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session or pid in [p.pid for p in process.parents()]:
                sockets = process.net_connections("tcp")
                found[process.pid] = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def test_an_own_cluster_is_for_this_machine_and_keeps_its_token(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    command = dbtrain("train", *SHORT, "training.steps=600", "name=run", "out=runs")
    run_ = tmp_path / "runs" / "run"
    wait_for(lambda: any(e["event"] == "step" for e in events(run_, 0)), 300, "the first step")
    worker = next(e["pid"] for e in events(run_, 0) if e["event"] == "start")
    addresses = listening(command.process.pid)
    assert worker in addresses
    all_ = set().union(*addresses.values())
    assert all_ and all(ip.removeprefix("::ffff:").startswith("127.") for ip in all_), addresses
    token = psutil.Process(worker).environ()["RAY_AUTH_TOKEN"]
    session = next(a for a in psutil.Process(worker).parent().cmdline() if "session_dir=" in a).split("=", 1)[1]
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(300) == 1
    time.sleep(1)
    files = [*tmp_path.rglob("*"), *Path(session, "logs").rglob("*")]
    read = [path for path in files if path.is_file()]
    assert len(token) == 64 and len(read) > 20
    assert not [path for path in read if token.encode() in path.read_bytes()]


def test_a_head_that_dies_under_a_client_ends_the_command_with_one_line(cluster: SomeCluster, tmp_path: Path) -> None:
    """The last test of the file: it ends the cluster of all."""
    try:
        address = ["--address", f"ray://127.0.0.1:{cluster.client}"]
        slow = json.dumps([{"block": 0, "step": step, "kind": "slow"} for step in range(12, 20)])
        command = run(
            cluster, tmp_path, ["-m", "dbtrain", "train", *SHORT, f"out={tmp_path}/runs", "name=run", *address],
            DBTRAIN_FAULTS=slow,
        )  # fmt: skip
        run_ = tmp_path / "runs" / "run"
        wait_for(lambda: bool(command.poll()) or any(e["event"] == "commit" for e in events(run_, 0)), 300, "a commit")
    finally:
        cluster.close()
    output = command.communicate(timeout=240)[0]
    assert command.returncode == 1, output
    assert "Traceback" not in output, output
    assert "error: the Ray cluster no longer answers" in output and "then run the same command" in output
