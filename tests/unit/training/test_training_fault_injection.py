import json
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.shards.storage.store import Store
from dbtrain.training.fault_injection import VARIABLE, FaultPlan


def plan(tmp_path, monkeypatch, text, block=1):
    monkeypatch.setenv(VARIABLE, text if isinstance(text, str) else json.dumps(text))
    return FaultPlan.from_environment(block, Store(tmp_path))


def test_without_the_variable_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    faults = FaultPlan.from_environment(0, Store(tmp_path))
    for step in range(100):
        faults.at_step(step)
        faults.in_commit(step, lambda: None)()
    assert not list(tmp_path.iterdir())


def test_a_fault_fires_at_its_step_in_its_block_and_only_once(tmp_path, monkeypatch):
    text = [{"block": 1, "step": 3, "kind": "raise"}, {"block": 0, "step": 2, "kind": "raise"}]
    faults = plan(tmp_path, monkeypatch, text)
    for step in (0, 1, 2):
        faults.at_step(step)
    with pytest.raises(RuntimeError, match="injected"):
        faults.at_step(3)
    plan(tmp_path, monkeypatch, text).at_step(3)  # the next attempt passes
    assert len(list((tmp_path / "faults").iterdir())) == 1


def test_a_fault_of_memory_is_a_real_memory_error_and_leaves_the_limit(tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError):
        plan(tmp_path, monkeypatch, [{"block": 1, "step": 0, "kind": "memory"}]).at_step(0)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_loss_is_damaged_once_and_left_alone_otherwise(tmp_path, monkeypatch):
    faults = plan(tmp_path, monkeypatch, [{"block": 1, "step": 2, "kind": "nan"}])
    losses = [float(faults.loss(step, torch.tensor(1.5))) for step in (1, 2, 2, 3)]
    assert losses == [1.5, pytest.approx(math.nan, nan_ok=True), 1.5, 1.5]


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "5",
        '{"block": 1}',
        "[3]",
        '["kill"]',
        '[{"step": 3, "kind": "kill"}]',
        '[{"block": 1, "kind": "kill"}]',
    ],
)
def test_a_malformed_plan_is_refused(tmp_path, monkeypatch, text):
    with pytest.raises(ConfigError, match="is no list of faults"):
        plan(tmp_path, monkeypatch, text)


def test_an_unknown_kind_is_refused_with_those_there_are(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="unknown fault 'explode'.*kill.*hang"):
        plan(tmp_path, monkeypatch, [{"block": 1, "step": 3, "kind": "explode"}])


def test_a_bit_of_the_newest_checkpoint_is_flipped_before_the_worker_dies(tmp_path):
    for step in (10, 20):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        for name in ("model.safetensors", "COMMIT.json"):
            (folder / name).write_bytes(b"abcdefgh")
    plan = '[{"block": 1, "step": 5, "kind": "flip_model"}]'
    code = (
        "from dbtrain.training.fault_injection import FaultPlan; from dbtrain.shards.storage.store import Store; "
        f"FaultPlan.from_environment(1, Store({str(tmp_path)!r})).at_step(5)"
    )
    died = subprocess.run([sys.executable, "-c", code], env={**os.environ, VARIABLE: plan}, timeout=60)
    assert died.returncode == -signal.SIGKILL
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.glob("step_*/*")}
    assert found.pop("step_00000020/model.safetensors") == b"abcdafgh"
    assert set(found.values()) == {b"abcdefgh"}
