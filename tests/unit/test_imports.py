"""What a process of a run imports decides how long it takes to start, so what it does not need stays out."""

import json
import subprocess
import sys

import torch
from sklearn.datasets import load_digits

from dbtrain.data.images import digits

PROGRAM = """
import json, sys
from dbtrain import cli
seen = {"command": [*sys.modules]}
import dbtrain.coordinator.ray.train_internals  # what a controller of Ray Train unpacks
seen["controller"] = [*sys.modules]
import dbtrain.api  # what every command imports when it begins its work
seen["interface"] = [*sys.modules]
from dbtrain.data.images import digits
digits(0.1)
import dbtrain.training.entry
import torch
from dbtrain.training.assignment import Assignment
from dbtrain.training.optimizer import adamw
dbtrain.training.entry.prepare_process(Assignment("runs/run", 0, 1, "token", "session", 1, None, "cpu", 1, 60.0))
weight = torch.ones(2, requires_grad=True)
weight.sum().backward()
optimizer = adamw([{"params": [weight]}])
optimizer.step()
optimizer.zero_grad()
assert torch.are_deterministic_algorithms_enabled()
seen["worker"] = [*sys.modules]
assert "torch._inductor" not in sys.modules
import torch._inductor.config
assert torch._inductor.config.deterministic
import mlflow  # still to be had, though DeepSpeed did not see it
print(json.dumps(seen))
"""
ABSENT = {
    "command": {"torch", "ray"},
    "controller": {"torch"},
    "interface": {
        "torchmetrics",
        "sklearn",
        "scipy",
        "matplotlib",
        "transformers",
        "diffusers",
        "deepspeed",
        "torch._dynamo",
    },
    "worker": {"mlflow", "wandb", "sklearn", "scipy", "matplotlib", "torch._dynamo"},
}


def test_a_process_imports_nothing_large_that_it_does_not_use() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = {process: set(modules) for process, modules in json.loads(done.stdout.splitlines()[-1]).items()}
    assert {process: seen[process] & absent for process, absent in ABSENT.items()} == dict.fromkeys(ABSENT, set())
    assert "deepspeed" in seen["worker"]


def test_the_digits_are_those_of_scikit_learn() -> None:
    bunch, data = load_digits(), digits(0.1)
    splits = (data.train, data.validation, data.test)
    assert torch.equal(torch.cat([split.images[:, 0] for split in splits]).double(), torch.from_numpy(bunch.images))
    assert torch.equal(torch.cat([split.labels for split in splits]), torch.from_numpy(bunch.target))
