"""A gather that is killed, stopped, cut off or short of room leaves a run as it was or as it becomes, and goes on."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.resume.test_shards_kill import killed_at, run_child, small_disk

pytestmark = pytest.mark.fault

SCENARIOS = {
    "first": ([], [20], False),
    "newer": ([10], [20], False),
    "back": ([20, 30], [10], True),
    "other": ([20], [20], True),
}
"""Steps that are here, steps that come, and whether those are asked for with --take."""


run_here = partial(run_child, program=__file__, timeout=550)


@pytest.mark.parametrize(("scenario", "packed"), [("newer", "folder"), *((name, "packed") for name in SCENARIOS)])
def test_kill_at_every_operation_of_a_gather(tmp_path, scenario, packed):
    told = run_here("kill", scenario, packed, tmp_path)
    assert told["wrong"] == []
    assert told["kills"] >= 40 and told["finished"] == 1
    assert told["old"] > 10 and told["new"] > 2


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_stopped_at_every_operation_of_an_object_store(tmp_path, scenario):
    told = run_here("stop", scenario, "packed", tmp_path)
    assert told["wrong"] == []
    assert told["kills"] >= 20 and told["finished"] == 1
    assert told["old"] > 5 and told["new"] > 2


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    if not small_disk(disk):
        pytest.skip("cannot mount a tmpfs here")
    try:
        told = run_here("full", "first", "packed", disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert told["error"].count("the disk is full; free space") == 1 and "\n" not in told["error"]
    assert told["steps"] == [10, 0] and told["temporaries"] == [] and told["pack"].count("the disk is full") == 1


# ------------------------------------------------------------------------------------------------- in the child process


def places(scenario, packed, where):
    """A run at home and what comes: (home, source, take, seeds of the old and the new checkpoint)."""
    from dbtrain.run.pack import pack
    from tests.unit.run.carried import commit, copied, sealed

    here, there, take = SCENARIOS[scenario]
    home = sealed(where / "home")
    other = copied(home, where / "there")
    for step in here:
        commit(home, 0, step)
    for step in there:
        commit(other, 0, step, seed=1000 + step)
    source = other.store.url
    if packed == "packed":
        source = pack(other, str(where / "packed")).url
    old = here[-1] if here else 0
    return home, source, take, (old, old), (there[-1], 1000 + there[-1])


def bring(run, source, take):
    from dbtrain.run.gather import gather

    gather(run, [] if take else [source], take=source if take else None)


def is_state(store, step, seed):
    """Whether the newest checkpoint of block 0 is the one of this step and seed; no checkpoint for step 0."""
    import torch

    from dbtrain.run.run import Run
    from tests.unit.run.carried import parts

    run = Run(store)
    found = run.block(0).checkpoints.newest(lambda line: None)
    if found is None or step == 0:
        return found is None and step == 0
    wanted = parts(run, 0, seed)
    same = all(torch.equal(t, found.parts[role][name]) for role in wanted for name, t in wanted[role].items())
    return found.step == step and same


def survey(told, store, old, new, nth, killed):
    """Count what an interrupted gather left."""
    is_old, is_new = is_state(store, *old), is_state(store, *new)
    told["kills" if killed else "finished"] += 1
    told["old"] += is_old
    told["new"] += is_new
    if not (is_old or is_new) or (not killed and not is_new):
        told["wrong"].append(f"operation {nth}: neither what was here nor what comes")


def finish(told, store, source, take, new, nth):
    """The same command goes on."""
    from dbtrain.run.run import Run

    bring(Run(store), source, take)
    if not is_state(store, *new):
        told["wrong"].append(f"operation {nth}: the same command did not finish it")
    folder = store.child("blocks", "00", f"step_{new[0]:08d}")
    if sorted(folder.list(temporaries=True)) != sorted(
        ["COMMIT.json", *Run(store).block(0).checkpoints.newest_commit().files]
    ):
        told["wrong"].append(f"operation {nth}: left {folder.list(temporaries=True)}")


def kill_child(scenario, packed, where):
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.store import Store

    home, source, take, old, new = places(scenario, packed, where)
    told = {"kills": 0, "finished": 0, "old": 0, "new": 0, "wrong": []}
    for nth in range(2000):
        trial = where / "try" / "toy"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(home.store.path, trial)
        killed = killed_at(nth, lambda trial=trial: bring(Run(Store(trial)), source, take))
        survey(told, Store(trial), old, new, nth, killed)
        finish(told, Store(trial), source, take, new, nth)
        if not killed or told["wrong"]:
            break
    print(json.dumps(told))


class Stopped(BaseException):
    """What a signal would raise."""


def stop_child(scenario, packed, where):
    from dbtrain.run.run import Run
    from dbtrain.shards.storage import remote
    from dbtrain.shards.storage.store import Store

    home, source, take, old, new = places(scenario, packed, where)
    told = {"kills": 0, "finished": 0, "old": 0, "new": 0, "wrong": []}
    armed = {"left": None}

    def arm(kind):
        real = getattr(remote.RemoteFiles, kind)

        def call(self, *arguments):
            if armed["left"] is not None:
                armed["left"] -= 1
                if armed["left"] < 0:
                    raise Stopped
            return real(self, *arguments)

        setattr(remote.RemoteFiles, kind, call)

    for kind in ("exists", "read", "reading", "size", "write", "write_stream", "create", "swap", "list", "remove"):
        arm(kind)
    for nth in range(2000):
        store = Store(f"memory://stopped-{nth}/toy")
        for path in sorted(home.store.path.rglob("*.*")):
            if path.is_file() and not path.name.startswith("."):
                store.write(str(path.relative_to(home.store.path)), path.read_bytes())
        armed["left"], killed = nth, False
        try:
            bring(Run(store), source, take)
        except Stopped:
            killed = True
        armed["left"] = None
        store.remove("LOCK.json")  # of this very process, which lives
        survey(told, store, old, new, nth, killed)
        finish(told, store, source, take, new, nth)
        if not killed or told["wrong"]:
            break
    print(json.dumps(told))


def full_child(scenario, packed, disk):
    from dbtrain.errors import ShardError
    from dbtrain.run.pack import pack
    from dbtrain.run.run import Run
    from tests.unit.run.carried import commit, copied, sealed, steps

    outside = disk.parent / "outside"
    home = sealed(outside)
    other = copied(home, disk.parent / "there")
    here = copied(home, disk)
    for block in (0, 1):
        commit(other, block, 20)
    commit(here, 0, 10)
    source, told = pack(other, str(outside / "packed")).url, {}
    (disk / "ballast").write_bytes(bytes(40_000))
    for name, work in (
        ("error", lambda: bring(Run(here.store), source, False)),
        ("pack", lambda: pack(other, f"{disk}/x")),
    ):
        try:
            work()
        except ShardError as error:
            told[name] = str(error)
    told["steps"] = steps(here)
    told["temporaries"] = [str(path) for path in disk.rglob(".*.tmp")]
    print(json.dumps(told))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    {"kill": kill_child, "stop": stop_child, "full": full_child}[sys.argv[1]](
        sys.argv[2], sys.argv[3], Path(sys.argv[4])
    )
