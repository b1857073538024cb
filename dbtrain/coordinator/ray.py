"""The only file that knows Ray: connect, look at the nodes, and run one attempt of one block as a TorchTrainer."""

import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dbtrain.coordinator.placement import Node, Request
from dbtrain.coordinator.shipping import runtime_env
from dbtrain.errors import PlacementError, VersionError
from dbtrain.training.assignment import Assignment

NODE_ANSWERS_S = 90.0
"""For a node to start a process and answer; the first one there also fetches this package."""


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
    # its message begins with half a page about the worker, before the cause
    worst = getattr(worst, "health_check_failure", worst)
    lines = [line.strip() for line in str(worst).splitlines() if line.strip()]
    return f"{type(worst).__name__}: {' '.join(lines)[:500]}"


class RayCluster:
    """A Ray cluster: the one at `address`, or one of this machine's own.

    Args:
        address: ``auto``, ``host:port``, or None.
        cpus: CPUs of a cluster of its own; those of the machine by default.

    Raises:
        PlacementError: there is no cluster at the address.
        VersionError: it has another version of Ray or Python than this process.
    """

    def __init__(self, address: str | None, cpus: float | None = None) -> None:
        common: dict[str, Any] = {
            "runtime_env": runtime_env(address),
            "log_to_driver": False,
            "logging_level": logging.WARNING,
        }
        try:
            if address is None:
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
            else:
                ray.init(address=address, **common)
        except Exception as error:
            if "ersion mismatch" in str(error):
                raise VersionError(f"{' '.join(str(error).split())}: use the cluster's Ray and Python here") from error
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
        return [Node(_name(node), dict(node["Resources"])) for node in _alive()]

    def addresses(self) -> dict[str, tuple[str, int, float]]:
        """Address and port of each node that is alive, and its GPUs as Ray counts them; by the name in `nodes`."""
        return {
            _name(node): (node["NodeManagerAddress"], node["NodeManagerPort"], node["Resources"].get("GPU", 0.0))
            for node in _alive()
        }

    def on_every_node(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call an importable function on each node at once; its value by the node's name, or the exception."""
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        calls = {}
        for node in _alive():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls[_name(node)] = task.options(scheduling_strategy=there).remote(*arguments)
        until = time.monotonic() + NODE_ANSWERS_S
        return {name: _value(call, until - time.monotonic()) for name, call in calls.items()}

    def start(self, assignment: Assignment, request: Request, name: str) -> Attempt:
        """Start an attempt; it waits for its resources if others hold them."""
        resources = dict(request.resources)
        trainer = TorchTrainer(
            _loop,
            train_loop_config=dataclasses.asdict(assignment),
            scaling_config=ScalingConfig(
                num_workers=request.workers, use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            torch_config=_GroupConfig(backend="nccl" if request.device == "cuda" else "gloo"),
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


class _Group(_TorchBackend):  # type: ignore[misc]
    """Process group of a block's workers; one worker alone gets a store in its own memory.

    PyTorch's TCP store listens on all addresses, without authentication, whatever address it is given.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called by Ray Train when the workers of an attempt are there."""
        if len(worker_group) > 1:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_join_alone, backend_config.backend)


class _GroupConfig(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[_Group]:
        return _Group


def _join_alone(backend: str) -> None:
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}#{node['NodeID'][:4]}"


def _value(call: Any, seconds: float) -> Any:
    try:
        return ray.get(call, timeout=max(1.0, seconds))
    except Exception as error:
        return error


def _loop(config: dict[str, Any]) -> None:
    from dbtrain.coordinator.signals import PROCESS_STOP, take_over
    from dbtrain.training.entry import work

    take_over()
    work(Assignment(**config), ray.train.get_context().get_world_rank(), PROCESS_STOP)
