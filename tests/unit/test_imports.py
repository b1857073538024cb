"""What a process of a run imports decides how long it takes to start, so what it does not need stays out."""

import subprocess
import sys

import pytest
import torch

from dbtrain.data.images import digits


def imported(program: str) -> set[str]:
    """Names of all modules that a fresh process has imported after this program."""
    script = f"{program}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import dbtrain.coordinator.ray.train_internals", {"torch"}),  # what a controller of Ray Train unpacks
        ("import dbtrain.training.entry", {"mlflow", "wandb", "sklearn", "matplotlib"}),
        ("from dbtrain.data.images import digits\ndigits(0.1)", {"sklearn", "scipy", "pandas"}),
        ("import dbtrain.cli", {"torch", "ray"}),
    ],
    ids=["controller", "worker", "digits", "command"],
)
def test_a_process_imports_nothing_large_that_it_does_not_use(program: str, absent: set[str]) -> None:
    assert not imported(program) & absent


def test_mlflow_can_still_be_imported_after_deepspeed() -> None:
    assert "mlflow" in imported("import dbtrain.training.engine\nimport mlflow")


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), digits(0.1)
    splits = (data.train, data.validation, data.test)
    images = torch.cat([split.images for split in splits])
    labels = torch.cat([split.labels for split in splits])
    assert torch.equal(images[:, 0].double(), torch.from_numpy(bunch.images))
    assert torch.equal(labels, torch.from_numpy(bunch.target))
