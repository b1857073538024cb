"""The only file that knows Ray: connect, look at the nodes, and run one attempt of one block as a TorchTrainer."""

import dataclasses
import logging
import os
import tempfile
import threading
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dbtrain.coordinator.placement import Node, Request
from dbtrain.coordinator.ray_settings import SETTINGS
from dbtrain.errors import PlacementError
from dbtrain.training.assignment import Assignment


class Attempt:
    """One attempt of one block, in a thread that waits for its trainer."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self._error: str | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = _reason(error)

    @property
    def over(self) -> bool:
        """Whether its workers have ended."""
        return not self._thread.is_alive()

    @property
    def error(self) -> str | None:
        """Why they died, if they did."""
        return self._error


def _reason(error: BaseException) -> str:
    """The innermost cause that says something, as one line."""
    chain = [error]
    while chain[-1].__cause__ or getattr(chain[-1], "cause", None):
        chain.append(chain[-1].__cause__ or chain[-1].cause)  # type: ignore[attr-defined]
    failures = getattr(error, "worker_failures", None)
    worst = next(iter(failures.values())) if failures else chain[-1]
    lines = [line.strip() for line in str(worst).splitlines() if line.strip()]
    return f"{type(worst).__name__}: {' '.join(lines)[:500]}"


class RayCluster:
    """A Ray cluster: the one at `address`, or one of this machine's own.

    Args:
        address: ``auto``, ``host:port``, or None.
        cpus: CPUs of a cluster of its own; those of the machine by default.

    Raises:
        PlacementError: there is no cluster at the address.
    """

    def __init__(self, address: str | None, cpus: float | None = None) -> None:
        passed = {k: v for k, v in os.environ.items() if k.startswith("DBTRAIN_") or k in SETTINGS}
        common: dict[str, Any] = {
            "runtime_env": {
                "env_vars": passed,
                "worker_process_setup_hook": "dbtrain.coordinator.signals.install",
            },
            "log_to_driver": False,
            "logging_level": logging.WARNING,
        }
        try:
            if address is None:
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
            else:
                ray.init(address=address, **common)
        except Exception as error:
            raise PlacementError(
                f"no Ray cluster answers at cluster.address={address!r} ({_reason(error)[:200]}): start one with ray "
                "start --head, check RAY_AUTH_TOKEN, or leave cluster.address empty for one of this machine's own"
            ) from error

    @property
    def address(self) -> str:
        """Where another command of this machine reaches the same cluster."""
        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Node]:
        """The nodes that are alive, with all they have."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        return [Node(f"{node['NodeManagerHostname']}#{node['NodeID'][:4]}", dict(node["Resources"])) for node in alive]

    def start(self, assignment: Assignment, request: Request, name: str) -> Attempt:
        """Start an attempt; it waits for its resources if others hold them."""
        resources = dict(request.resources)
        trainer = TorchTrainer(
            _loop,
            train_loop_config=dataclasses.asdict(assignment),
            scaling_config=ScalingConfig(
                num_workers=request.workers, use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if request.device == "cuda" else "gloo"),
            run_config=RunConfig(
                name=name,
                # nothing of ours is kept there: our own commits are the truth
                storage_path=os.path.join(tempfile.gettempdir(), f"dbtrain-ray-{os.getuid()}"),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        return Attempt(trainer)

    def close(self) -> None:
        """Leave the cluster; what still runs for this driver ends."""
        ray.shutdown()


def _loop(config: dict[str, Any]) -> None:
    from dbtrain.coordinator.signals import PROCESS_STOP, take_over
    from dbtrain.training.worker import work

    take_over()
    work(Assignment(**config), ray.train.get_context().get_world_rank(), PROCESS_STOP)
