"""A Ray cluster: connect to it and look at its nodes. Ray is known in this package alone."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from psutil import Process
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dbtrain.coordinator.placement import Node, node_name
from dbtrain.coordinator.ray import own_cluster
from dbtrain.coordinator.ray.attempt import Attempt
from dbtrain.coordinator.ray.hosts import RayHosts
from dbtrain.coordinator.ray.shipping import runtime_env
from dbtrain.coordinator.ray.train_internals import ControllerProcess, reason
from dbtrain.errors import PlacementError, VersionError
from dbtrain.run.requests import Request
from dbtrain.training.assignment import Assignment

CLIENT_TRIES = 3
"""The process that Ray Client's server starts for a client
now and then ends before it has begun (Ray 2.60)."""
NODE_ANSWERS_S = 90.0
"""How long a node may take to start a process and answer; its first process also fetches this package."""


class RayCluster:
    """A Ray cluster: the one at `address`, or one of this machine's own.

    Args:
        address: ``auto``, ``host:port``, or None.
        modules: files and packages of the user's that its workers import.

    Raises:
        PlacementError: there is no cluster at the address.
        VersionError: it has another version of Ray or Python than this process.
    """

    def __init__(self, address: str | None, modules: Sequence[Path] = ()) -> None:
        common: dict[str, Any] = {
            "runtime_env": runtime_env(address, modules),
            "log_to_driver": False,
            "logging_level": logging.WARNING,
        }
        self._controllers = ControllerProcess()
        self._daemons: list[Process] = []
        """Processes of a cluster that this command started; none of another cluster."""
        try:
            with _sigterm_kept():
                if address is None:
                    self._daemons = own_cluster.start(common)
                else:
                    _join(address, common)
        except Exception as error:
            if "ersion mismatch" in str(error):
                raise VersionError(f"{' '.join(str(error).split())}: use the cluster's Ray and Python here") from error
            if address is None:
                raise PlacementError(
                    f"Ray does not start on this machine ({reason(error)[:200]}): see its logs in the folder ray/ "
                    "below the one for temporary files (RAY_TMPDIR, TMPDIR or /tmp), and whether that has space; "
                    "dbtrain doctor looks at more"
                ) from error
            raise PlacementError(
                f"no Ray cluster answers at cluster.address={address!r} ({reason(error)[:200]}): start one with ray "
                "start --head, check RAY_AUTH_TOKEN, or leave cluster.address empty for one of this machine's own"
            ) from error

    @property
    def address(self) -> str:
        """Where another command of this machine reaches the same cluster."""
        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Node]:
        """The nodes that are alive, with all they have.

        Raises:
            PlacementError: the cluster no longer answers.
        """
        return [Node(_name(node), dict(node["Resources"])) for node in _alive()]

    def addresses(self) -> dict[str, tuple[str, int, float]]:
        """Address and port of each node that is alive, and its GPUs as Ray counts them;
        by the name in `nodes`."""
        return {
            _name(node): (node["NodeManagerAddress"], node["NodeManagerPort"], node["Resources"].get("GPU", 0.0))
            for node in _alive()
        }

    def on_every_node(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call an importable function on each node at once; its value by the node's name, or the exception.

        A node that was lost shortly before still counts as alive; it is left out, once its silence has told.
        """
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        calls = {}
        for node in _alive():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls[_name(node)] = task.options(scheduling_strategy=there).remote(*arguments)
        until = time.monotonic() + NODE_ANSWERS_S
        values = {name: _value(call, until - time.monotonic()) for name, call in calls.items()}
        alive = {_name(node) for node in _alive()}
        return {name: value for name, value in values.items() if name in alive}

    def start(self, assignment: Assignment, request: Request, name: str) -> Attempt:
        """Start an attempt; it waits for its resources if others hold them."""
        return Attempt(assignment, request, name, self._controllers)

    def hosts(self, device: str, cpus: float) -> RayHosts:
        """Room for processes that each hold an object; closing them leaves the cluster.

        Args:
            device: ``cuda`` gives each process a GPU.
            cpus: CPUs of each process.
        """
        return RayHosts(self, device, cpus)

    def check_alive(self) -> None:
        """Make sure that a cluster of this command's own has not ended.

        Raises:
            PlacementError: it has, and nothing of it can be used any more.
        """
        own_cluster.check_alive(self._daemons)

    def close(self) -> None:
        """Leave the cluster; what still runs for this driver ends."""
        try:
            self.check_alive()
        except PlacementError:
            return  # Ray would wait for what has ended until it ends this process, before the error is told
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back to whoever answers it: Ray's own answer ends the process with code 15, and a dump."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _join(address: str, common: dict[str, Any]) -> None:
    """Connect to a cluster; again where only Ray Client's server had failed."""
    for left in reversed(range(CLIENT_TRIES)):
        try:
            ray.init(address=address, **common)
            return
        except ConnectionAbortedError:
            if not left:
                raise


def _alive() -> list[dict[str, Any]]:
    try:
        return [node for node in ray.nodes() if node["Alive"]]
    except Exception as error:  # a lost Ray Client raises a bare one
        raise PlacementError(
            f"the Ray cluster no longer answers ({reason(error)[:200]}): start it again, then run the same command; "
            "what is committed stays"
        ) from error


def _name(node: dict[str, Any]) -> str:
    return node_name(node["NodeManagerHostname"], node["NodeID"])


def _value(call: Any, seconds: float) -> Any:
    try:
        return ray.get(call, timeout=max(1.0, seconds))
    except Exception as error:
        return error
