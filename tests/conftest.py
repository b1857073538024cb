"""Fixtures that several rooms' tests share: a small configuration, and runs of the real command."""

import atexit
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
TINY = [
    "model.depth=3",
    "model.dim=16",
    "model.heads=2",
    "model.patch=4",
    "codebook.dim=16",
    "noise.ranges=uniform",
    "noise.sigma_min=0.5",
    "noise.sigma_max=20",
    "training.steps=60",
    "training.batch_size=16",
    "training.checkpoint_every=10",
    "training.log_every=5",
    "cluster.backoff_s=0.1",
]


CONFIG = str(ROOT / "configs" / "vit_digits.yaml")
STEPS = 60
RUN = [CONFIG, "name=run", "blocks=3", *TINY]
TRAIN = ["train", *RUN, "cluster.cpus_per_worker=0.5"]
"""The run that is disturbed in many ways; all of them end in the same bits."""


TOGETHER = {
    **dict.fromkeys((f"tests/cluster/test_{name}.py" for name in ("address", "launchers")), "heads"),
    **dict.fromkeys((f"tests/cluster/test_{name}.py" for name in ("three_rooms", "ssh", "lost_node")), "nodes"),
}
"""Files of which one must end before another begins: they start heads of Ray on this machine itself, or so many nodes
that two cores which have those of several files need more than a minute for a worker's start."""
APART = frozenset(
    f"tests/{name}.py"
    for name in (
        *("cluster/test_branch_starts", "cluster/test_isolation", "cluster/test_language_models"),
        *("resume/test_covering_array", "resume/test_engine", "resume/test_gather_faults"),
        *("resume/test_start_faults", "resume/test_zero_faults"),
    )
)
"""Files whose tests share no fixture, and take long enough to be done by several processes."""
LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        *("cluster/test_docker", "cluster/test_slurm", "cluster/test_address", "cluster/test_hosts"),
        *("resume/test_command_faults", "resume/test_handovers", "resume/test_worker_faults", "cluster/test_branch"),
        *("resume/test_engine", "cluster/test_own_network", "resume/test_soak", "resume/test_extend"),
    )
)
"""They begin first, so that no process has a long file left when the others have ended."""


class Scheduling(LoadScopeScheduling):
    """Gives whole files to processes, but for those above."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return nodeid if file in APART else TOGETHER.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    """For `--dist loadgroup`, whose own scheduler sees no marks under pytest 9.2 (pytest-xdist 3.8.0)."""
    return Scheduling(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all others stay in their order."""
    first = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.split("::", 1)[0], len(first)))


@functools.cache
def ray_folder() -> str:
    """Where the clusters of this process keep their files: Ray notes the address of "the" cluster of a machine there.

    Its path is short because sockets lie in it.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _hear_ctrl_c() -> None:
    """Parallel test runners ignore it, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A `dbtrain` command in its own process group, which can be watched and killed."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        faults: Sequence[dict[str, Any]] = (),
        program: Sequence[str] = (sys.executable, "-m", "dbtrain"),
        **variables: str,
    ) -> None:
        environment = {**os.environ, "DBTRAIN_FAULTS": json.dumps(list(faults)), "NO_COLOR": "1", "COLUMNS": "200"}
        environment |= {"RAY_TMPDIR": ray_folder(), **variables}
        environment.pop("RAY_ADDRESS", None)
        self.folder = folder
        self.log = folder / f"command-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, *arguments],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,
            )

    def wait(self, timeout: float = 480) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the command took more than {timeout} s:\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(120)


@pytest.fixture
def dbtrain(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a command in a temporary folder; whatever is left of it is killed at the end."""
    started: list[Command] = []

    def start(*arguments: str, faults: Sequence[dict[str, Any]] = (), **variables: str) -> Command:
        command = Command(tmp_path, arguments, faults, **variables)
        started.append(command)
        return command

    yield start
    for command in started:
        command.kill()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the run that nothing happened to; its blocks trained side by side, once for all processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _train_undisturbed(folder)
            (folder / "done").touch()
    return folder / "runs" / "run"


def _train_undisturbed(folder: Path) -> None:
    command = Command(folder, [*TRAIN, "telemetry.trackers=[tensorboard]"])
    try:
        assert command.wait() == 0, command.output()
    finally:
        command.kill()


@pytest.fixture(scope="session")
def expected(undisturbed: Path) -> dict[str, bytes]:
    """Its last shards."""
    found = shards(undisturbed, STEPS)
    assert len(found) == 9  # three blocks of model, ema and optim
    return found


def events(run: Path, block: int) -> list[dict[str, Any]]:
    """All events of a block, of all attempts in their order."""
    attempts = sorted((run / "blocks" / f"{block:02d}" / "attempts").glob("*"), key=lambda path: int(path.name))
    lines = [line for a in attempts if (a / "events.jsonl").exists() for line in (a / "events.jsonl").open()]
    return [json.loads(line) for line in lines]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {seconds} s")
        time.sleep(0.05)


def shards(run: Path, step: int) -> dict[str, bytes]:
    """Content of every shard of a step, by block and file."""
    return {
        f"{path.parent.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(run.glob(f"blocks/*/step_{step:08d}/*.safetensors"))
    }
