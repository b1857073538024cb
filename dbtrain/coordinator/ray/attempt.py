"""One attempt of one block by Ray Train, in a thread that waits for it."""

import dataclasses
import os
import tempfile
import threading
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig

from dbtrain.coordinator.ray.train_internals import WHOLE, ControllerProcess, LeanTrainer, ProcessGroupConfig, reason
from dbtrain.run.requests import Request
from dbtrain.training.assignment import Assignment


class Attempt:
    """One attempt of one block; it waits for its resources if others hold them."""

    def __init__(self, assignment: Assignment, request: Request, name: str, controllers: ControllerProcess) -> None:
        self._trainer = _trainer(assignment, request, name, controllers)
        self._error: str | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = reason(error, WHOLE)

    @property
    def over(self) -> bool:
        """Whether its workers have ended."""
        return not self._thread.is_alive()

    @property
    def error(self) -> str | None:
        """All that Ray says of their death, if they died."""
        return self._error


def _trainer(assignment: Assignment, request: Request, name: str, controllers: ControllerProcess) -> LeanTrainer:
    resources = dict(request.resources)
    return LeanTrainer(
        controllers,
        _loop,
        train_loop_config=dataclasses.asdict(assignment),
        scaling_config=ScalingConfig(
            num_workers=request.workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        backend_config=ProcessGroupConfig(backend="nccl" if request.device == "cuda" else "gloo"),
        run_config=RunConfig(
            name=name,
            # nothing of ours is kept there: our own commits are the truth
            storage_path=os.path.join(tempfile.gettempdir(), f"dbtrain-ray-{os.getuid()}"),
            # the controller alone decides what comes back, and where; Ray would try a start again without end
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _loop(config: dict[str, Any]) -> None:
    from dbtrain.coordinator.ray.signals import PROCESS_STOP, take_over
    from dbtrain.training.entry import work

    take_over()
    node = {"node": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address()}
    work(Assignment(**config), ray.train.get_context().get_world_rank(), PROCESS_STOP, node)
