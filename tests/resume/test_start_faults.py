"""Workers die between their placement and their first word: Ray gives back what they held, and the block returns."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.utils import get_num_cpus

from dbtrain.coordinator.exit_reasons import KILLED
from dbtrain.coordinator.ray.settings import SETTINGS
from tests.conftest import CONFIG, ROOT, TINY, Command

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(600)]

KILLED_ONCE = """
import os, signal, sys
from dbtrain.cli import main
from dbtrain.coordinator.ray.settings import prepare
prepare(None, loopback=True)
from dbtrain.coordinator.ray import attempt, train_internals

class Group(train_internals.ProcessGroup):
    def on_start(self, worker_group, backend_config):
        if {stage!r} == "joins":
            worker_group.execute(die_once)
        super().on_start(worker_group, backend_config)

class GroupConfig(train_internals.ProcessGroupConfig):
    @property
    def backend_cls(self):
        return Group

class Loop:
    "Kills the worker that unpacks it, which Ray Train does right before it starts the training thread."
    def __call__(self, config):
        loop(config)

    def __reduce__(self):
        return unpack, ()

def unpack():
    if {stage!r} == "launches":
        die_once()
    return Loop()

def die_once():
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

loop, attempt.ProcessGroupConfig, attempt._loop = attempt._loop, GroupConfig, Loop()
sys.argv[1:] = {arguments!r}
main()
"""
"""What `__main__` defines travels by value, so it is these that Ray Train runs in its processes."""


class Altered(Command):
    """The command with a kill of its first worker at a stage of its start."""

    def __init__(self, folder: Path, stage: str) -> None:
        # all CPUs: while the dead worker's are held nothing else can be placed
        size = ["blocks=1", "training.steps=10", f"cluster.cpus_per_worker={get_num_cpus()}", "cluster.device=cpu"]
        arguments = ["train", CONFIG, "name=run", *TINY, *size]
        self.marker = folder / "killed"
        script = folder / "altered.py"
        script.write_text(KILLED_ONCE.format(stage=stage, marker=str(self.marker), arguments=arguments))
        super().__init__(folder, [], program=[sys.executable, str(script)], PYTHONPATH=str(ROOT))


@pytest.fixture(params=["joins", "launches"])
def altered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Altered]:
    command = Altered(tmp_path, request.param)
    yield command
    command.kill()


def test_a_worker_that_dies_before_its_first_word_costs_one_attempt(altered: Altered) -> None:
    assert altered.wait(280) == 0, altered.output()
    assert altered.marker.exists()
    attempts = sorted(path.name for path in altered.folder.glob("runs/run/blocks/00/attempts/*"))
    assert attempts[-1] == "2", altered.output()
    told = " ".join(altered.output().split())
    assert told.count("block 0: crashed, committed step 0; comes back") == 1
    assert f"comes back ({KILLED})" in told  # the cause, not only that there was one
    assert "ActorDiedError" not in told and "Worker exit detail" not in told
    told = (altered.folder / "runs/run/blocks/00/attempts/1/events-coordinator.jsonl").read_text()
    placed, died = map(json.loads, told.splitlines())
    assert placed["event"] == "placed" and "ActorDiedError" in died["error"]
    assert json.loads((altered.folder / "runs/run/blocks/00/state.json").read_text())["restarts"] == 1


def test_waiting_for_resources_is_no_error() -> None:
    """Ray Train gives up after a minute by default, and a time-out of a start is no longer tried again."""
    assert float(SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) > 86_400
