"""A commit and its reading take no memory beside the tensors themselves, whatever their size."""

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.side_by_side import at_once
from dbtrain.shards.storage.store import Store

MIB = 1 << 20
TENSORS_MIB = 384
ALLOWED_MIB = 96
"""Far less than one of the three files; what is left are pieces, threads and the interpreter's own growth."""


def test_memory_of_a_commit_and_of_reading_it(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["same"] and told["commit"] < ALLOWED_MIB
    assert told["read"] < TENSORS_MIB + ALLOWED_MIB


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder):
    """Grow the peak by nothing but a commit, then by nothing but reading it back."""
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest as make

    count = TENSORS_MIB * MIB // 12
    model = {"layers.2.w": torch.rand(count // 2), "layers.3.w": torch.rand(count // 2)}
    optim = {f"exp_avg{i}/layers.{2 + i}.w": torch.rand(count // 2) for i in range(2)}
    parts = {"model": model, "ema": {name: torch.rand(count // 2) for name in model}, "optim": optim}
    make.commit(Checkpoints(Store(f"{folder}/small"), make.identity()), 1, make.parts(1))  # imports and threads
    checkpoints = Checkpoints(Store(folder), make.identity())
    before = peak_mib()
    make.commit(checkpoints, 10, parts)
    after = peak_mib()
    found = checkpoints.newest()
    told = {"commit": after - before, "read": peak_mib() - after, "same": make.same(found.parts, parts)}
    print(json.dumps(told))


def test_calls_at_once_are_at_once_and_the_first_error_is_raised_when_all_have_ended():
    gate, ended = threading.Barrier(3, timeout=60), []

    def call(number):
        gate.wait()
        ended.append(number)
        if number:
            raise ValueError(f"call {number}")
        return number

    with pytest.raises(ValueError, match="call 1"):
        at_once([lambda n=n: call(n) for n in range(3)])
    assert sorted(ended) == [0, 1, 2]
    assert at_once([lambda: 1, lambda: 2]) == [1, 2] and at_once([]) == []


if __name__ == "__main__":
    measure(sys.argv[1])
