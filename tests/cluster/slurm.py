"""A Slurm cluster on one machine: the controller and each node on a host of its own (see hosts.py)."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster import hosts
from tests.cluster.hosts import Network
from tests.conftest import ROOT, wait_for

CONTROL = "ctl"
DAEMONS = ("slurmctld", "slurmd", "munged")

# Times are short so that a lost node is down after 25 s, and a requeued job need not wait two minutes for its
# credential to expire. Slurm 22.05 looks for cgroups even where it shall use none; naming a version stops the search.
CONF = """
ClusterName=dbtrain
SlurmctldHost={control}({control_ip})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=5
BatchStartTimeout=10
JobRequeue=1
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm cluster here, or None."""
    absent = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"{', '.join(absent)} not found: install slurm-wlm and munge"
    return hosts.missing()


class Slurm:
    """A context manager; nodes are named n1, n2 and so on, with two CPUs each."""

    def __init__(self, nodes: int, environment: dict[str, str]) -> None:
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        # short, because of the socket in it
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        conf = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        token = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": ""}  # the job makes its own
        python = {"PYTHONPATH": str(ROOT), "DBTRAIN_NODE_FOLDER": "/run"}
        python["DBTRAIN_RAY_OPTIONS"] = "--object-store-memory=100000000"
        self.network = Network([CONTROL, *self.names], {**conf, **python, **token, **environment})

    def __enter__(self) -> "Slurm":
        self.network.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        addresses = self.network.addresses
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={addresses[name]} CPUs=2 RealMemory=4000 State=UNKNOWN" for name in self.names
        )
        content = CONF.format(folder=self.folder, control=CONTROL, control_ip=addresses[CONTROL], nodes=nodes)
        (self.folder / "slurm.conf").write_text(content)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("munge", "state", "spool", *(f"spool/{name}" for name in self.names)):
            (self.folder / name).mkdir(mode=0o700)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        munge = [f"--{name}={self.folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon(CONTROL, ["munged", "--foreground", "--force", f"--key-file={key}", *munge])
        wait_for((self.folder / "munge" / "socket").exists, 60, "munged")
        self._daemon(CONTROL, ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for name in self.names:
            self._daemon(name, ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")])
        idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        wait_for(lambda: self.call(idle, check=False).strip() == str(len(self.names)), 120, "the nodes of Slurm")

    def _daemon(self, host: str, command: Sequence[str]) -> None:
        self.network.start(host, command, self.folder / f"{command[0]}-{host}.out")

    def call(self, command: Sequence[str], check: bool = True, cwd: Path | None = None) -> str:
        """Output of a command on the controller's host."""
        enter = self.network.hosts[CONTROL].enter
        if cwd is not None:
            enter = [*enter[:-1], f"--wd={cwd}"]
        done = subprocess.run(
            [*enter, *command], env=self.network.environment, text=True, capture_output=True, timeout=240
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def launch(self, folder: Path, *arguments: str) -> int:
        """`dbtrain launch slurm` in a folder; the job's number."""
        command = [sys.executable, "-m", "dbtrain", "launch", "slurm", *arguments]
        return int(self.call(command, cwd=folder).split()[-1])

    def state(self, job: int) -> str:
        """Such as RUNNING."""
        return self.field(job, "JobState")

    def field(self, job: int, name: str) -> str:
        """A field of `scontrol show job`; "" when Slurm does not know the job."""
        shown = self.call(["scontrol", "show", "job", str(job)], check=False)
        return next((part.split("=", 1)[1] for part in shown.split() if part.startswith(f"{name}=")), "")

    def head(self, job: int) -> str:
        """Node of a job's head."""
        return self.field(job, "BatchHost")

    def wait(self, job: int, states: Sequence[str], seconds: float, folder: Path) -> str:
        """Until the job is in one of the states."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            logs = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in folder.glob("dbtrain-*.log"))
            assert time.monotonic() < end, f"job {job} is {state}, not {states}:\n{logs}"
            time.sleep(0.3)
        return state

    def wait_for(self, job: int, condition: Callable[[], bool], seconds: float, folder: Path) -> None:
        """Until a condition holds, while the job is waiting or running."""
        end = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in folder.glob("dbtrain-*.log"))
            state = self.state(job)
            alive = state in ("PENDING", "CONFIGURING", "RUNNING")
            assert alive and time.monotonic() < end, f"job {job} is {state}:\n{logs}"
            time.sleep(0.3)

    def processes(self) -> list[str]:
        """Of Ray and Python, on all nodes that have power."""
        found = [line for name in self.names for line in self.network.hosts[name].processes().values()]
        return [line for line in found if "ray" in line or "dbtrain" in line]

    def environment_of_ray(self, name: str) -> dict[str, str]:
        """Variables of a node's raylet."""
        host = self.network.hosts[name]
        number = next(number for number, line in host.processes().items() if "raylet/raylet" in line)
        enter = [*host.enter, "cat", f"/proc/{number}/environ"]
        content = subprocess.run(enter, text=True, capture_output=True, check=True).stdout
        return dict(part.split("=", 1) for part in content.split("\0") if "=" in part)

    def power_off(self, name: str) -> None:
        """The node's cable and power go."""
        with contextlib.suppress(RuntimeError):
            self.network.plug(name, False)
        self.network.hosts[name].power_off()
