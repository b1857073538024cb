"""A process killed at every single write, sync and rename of a commit or merge leaves the old state or the new one."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "close")

COMMITS = ["first", "second", "prune", "keep-one", "other-content", "same-content", "over-leftovers", "no-links"]


def run_child(*arguments, program=__file__, timeout=500):
    """What a process of its own, which runs `program` with these arguments, prints as its last line of JSON."""
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.fault
@pytest.mark.parametrize("scenario", COMMITS)
def test_kill_at_every_operation_of_a_commit(tmp_path, scenario):
    told = run_child("commit", scenario, tmp_path)
    assert told["wrong"] == []
    assert told["kills"] >= (4 if scenario == "same-content" else 40) and told["finished"] == 1
    assert told["old"] > 0
    if scenario != "same-content":
        assert told["new"] > 0


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["whole", "now"])
def test_kill_at_every_operation_of_a_merge(tmp_path, kind):
    told = run_child("merge", kind, tmp_path)
    least = 30 if kind == "whole" else 5  # every 29th of its many more
    assert told["wrong"] == [] and told["kills"] >= least and told["old"] > 0 and told["new"] > 0


@pytest.mark.fault
def test_the_harness_would_notice(tmp_path):
    """The same kills against a commit that writes COMMIT.json first must be told apart from a good one."""
    assert run_child("commit", "sabotaged", tmp_path)["wrong"] != []


def small_disk(path):
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True)
    return done.returncode == 0


@pytest.mark.fault
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    if not small_disk(disk):
        pytest.skip("cannot mount a tmpfs here")
    try:
        told = run_child("full", disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "disk is full" in told["error"] and told["newest"] == 10 and told["whole"] and told["temporaries"] == []


@pytest.mark.fault
def test_a_file_size_limit(tmp_path):
    told = run_child("limit", tmp_path / "run")
    assert "file size limit" in told["error"] and told["newest"] == 10 and told["whole"] and told["temporaries"] == []


# ------------------------------------------------------------------------------------------------- in the child process


def arm(nth):
    """Kill this process at its n-th operation; a write is cut in half first."""
    count = iter(range(10**9))
    real_write = os.write

    def armed(kind, real):
        def call(*args, **kwargs):
            if next(count) == nth:
                if kind == "write":
                    real_write(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for kind in OPERATIONS:
        setattr(os, kind, armed(kind, getattr(os, kind)))


def refuse_links():
    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    os.link = refuse


def killed_at(nth, work):
    """Fork, work, and die at the n-th operation; False when the work ended before."""
    pid = os.fork()
    if pid == 0:
        arm(nth)
        work()
        os.kill(os.getpid(), signal.SIGTERM)
    return os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def samples():
    sys.path.insert(0, str(REPOSITORY / "tests" / "unit" / "shards"))
    import conftest

    return conftest


def prepare(scenario, base, make):
    """Set up the state before the commit; returns keep, step, old step and parts, new parts."""
    from dbtrain.shards.checkpoint import Checkpoints
    from dbtrain.shards.storage.store import Store

    keep = 1 if scenario == "keep-one" else 2
    checkpoints = Checkpoints(Store(base), make.identity(), keep=keep)
    steps = {"first": [], "over-leftovers": [10], "prune": [5, 8, 10], "keep-one": [10]}.get(scenario, [10])
    for step in steps:
        make.commit(checkpoints, step, make.parts(step))
    again = scenario in ("other-content", "same-content")
    step = 10 if again else 20
    new = make.parts(10 if scenario == "same-content" else 20)
    if scenario == "over-leftovers":
        folder = Store(base).child("step_00000020")
        folder.write("model.safetensors", b"torn")
        folder.write(".ema.safetensors.0.tmp", b"torn")
    old = (10, make.parts(10)) if steps else None
    return keep, step, old, new


def commit_child(scenario, where):
    make = samples()
    from dbtrain.shards import checkpoint
    from dbtrain.shards.checkpoint import Checkpoints
    from dbtrain.shards.storage.store import Store

    base = Path(where) / "base"
    base.mkdir()
    if scenario == "no-links":
        refuse_links()
    keep, step, old, new = prepare(scenario, base, make)
    told = {"kills": 0, "finished": 0, "old": 0, "new": 0, "wrong": []}
    if scenario == "sabotaged":
        real = checkpoint.store_shard

        def early(folder, role, data):
            folder.write("COMMIT.json", Store(base).read("step_00000010/COMMIT.json"))
            if step == 20:  # overwrite the good one in place
                Store(base.parent / "try").write("step_00000010/model.safetensors", data[: len(data) // 2])
            return real(folder, role, data)

        checkpoint.store_shard = early
    for nth in range(1000):
        trial = base.parent / "try"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(base, trial)

        def work(trial=trial):
            make.commit(Checkpoints(Store(trial), make.identity(), keep=keep), step, new)

        killed = killed_at(nth, work)
        told["kills" if killed else "finished"] += 1
        found = Checkpoints(Store(trial), make.identity(), keep=keep).newest(lambda line: told["wrong"].append(line))
        is_new = found is not None and found.step == step and make.same(found.parts, new)
        is_old = (
            found is None
            if old is None
            else found is not None and found.step == old[0] and make.same(found.parts, old[1])
        )
        told["new"] += is_new
        told["old"] += is_old
        if not (is_new or is_old) or (not killed and not is_new):
            told["wrong"].append(f"operation {nth}: {found and found.step}")
        told["wrong"] += fix(trial, make, keep, step, new) if scenario != "sabotaged" else []
        if not killed or told["wrong"]:
            break
    print(json.dumps(told))


def fix(trial, make, keep, step, new):
    """What is wrong after the next attempt has committed the same step and a later one on top of what the kill left."""
    from dbtrain.shards.checkpoint import Checkpoints
    from dbtrain.shards.storage.store import Store

    checkpoints = Checkpoints(Store(trial), make.identity(), keep=keep)
    done = make.commit(checkpoints, step, new)
    wrong = [] if make.same(checkpoints.newest().parts, new) else ["the next commit is not the newest"]
    folder = f"{trial}/step_{step:08d}"
    if sorted(os.listdir(folder)) != sorted(["COMMIT.json", *done.files]):
        wrong.append(f"left in the directory: {os.listdir(folder)}")
    make.commit(checkpoints, 30, make.parts(30))
    if len([name for name in os.listdir(trial) if name.startswith("step_")]) > keep:
        wrong.append(f"not cleaned: {os.listdir(trial)}")
    return wrong


def merge_child(kind, where):
    make = samples()
    import torch

    from dbtrain.run.merge import merge, read_back
    from dbtrain.run.newest import merge_newest
    from dbtrain.run.run import Run
    from dbtrain.shards.merged_directory import MergedDirectory
    from dbtrain.shards.storage.store import Store

    def again(run):
        return merge(run) if kind == "whole" else merge_newest(run, lambda of, merged: read_back(merged))

    base, trial = Path(where) / "base", Path(where) / "try"
    codes = torch.ones(2, 2)
    old = make.make_run(Store(base), codes)
    merge(Run(Store(base)))
    new = make.make_run(Store(base), codes, seed=50, steps=(6, 6, 6))
    told = {"kills": 0, "finished": 0, "old": 0, "new": 0, "wrong": []}
    for nth in range(0, 3000, 1 if kind == "whole" else 29):
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(base, trial)
        killed = killed_at(nth, lambda: again(Run(Store(trial))))
        told["kills" if killed else "finished"] += 1
        merged = Store(trial).child("merged")
        found = [MergedDirectory(merged).block(block) for block in range(3)]
        MergedDirectory(merged).codebook()
        is_old = all(make.same(f, w["ema"]) for f, w in zip(found, old, strict=True))
        is_new = all(make.same(f, w["ema"]) for f, w in zip(found, new, strict=True))
        told["old"] += is_old
        told["new"] += is_new
        again(Run(Store(trial)))
        if not (is_old or is_new) or (not killed and not is_new):
            told["wrong"].append(f"operation {nth}")
        if Store(trial).list() != ["blocks", "codebook.safetensors", "merged", "run.json"]:
            told["wrong"].append(f"left: {os.listdir(trial)}")
        if not killed or told["wrong"]:
            break
    print(json.dumps(told))


def full_child(kind, where):
    make = samples()
    import torch

    from dbtrain.errors import ShardError
    from dbtrain.shards.checkpoint import Checkpoints
    from dbtrain.shards.storage.store import Store

    checkpoints, old = Checkpoints(Store(where), make.identity()), make.parts(10)
    make.commit(checkpoints, 10, old)
    if kind == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    error = ""
    try:
        make.commit(checkpoints, 20, {"model": {"layers.2.w": torch.randn(100_000)}})
    except ShardError as err:
        error = str(err)
    found = checkpoints.newest()
    left = [name for _, _, names in os.walk(where) for name in names if name.endswith(".tmp")]
    told = {"error": error, "newest": found.step, "whole": make.same(found.parts, old), "temporaries": left}
    print(json.dumps(told))


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "commit":
        commit_child(*rest)
    elif kind == "merge":
        merge_child(*rest)
    else:
        full_child(kind, *rest)
