"""A worker's device is settled before anything asks for one."""

import os
from typing import Any

import pytest


class Workers:
    """One worker, this process; it notes what it is told to do, and does what comes first."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __len__(self) -> int:
        return 1

    def execute(self, function: Any, *arguments: Any) -> None:
        self.told.append(function.__name__)
        if len(self.told) == 1:
            function(*arguments)


@pytest.mark.parametrize(
    ("backend", "accelerator", "visible"), [("gloo", "cpu", ""), ("nccl", "cuda", "3,4")], ids=["cpu", "cuda"]
)
def test_a_worker_without_gpus_sees_none(
    backend: str, accelerator: str, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray hides them from nobody who asked for none, and DeepSpeed takes what it finds when it is imported."""
    from dbtrain.coordinator.ray.train_internals import ProcessGroup, ProcessGroupConfig

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setenv("DS_ACCELERATOR", "other")
    workers = Workers()
    ProcessGroup().on_start(workers, ProcessGroupConfig(backend=backend))
    assert len(workers.told) == 3  # the group is joined after it
    assert (os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"]) == (accelerator, visible)
