"""Processes of a Ray cluster that each hold an object, such as some blocks of a merged model."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from dbtrain.coordinator.ray.train_internals import ASK_AGAIN_S, answer, reason
from dbtrain.errors import HostDiedError, PlacementError

if TYPE_CHECKING:
    from dbtrain.coordinator.ray.cluster import RayCluster

AT_ONCE = 2
"""Calls that a process works on at once: one computes while the answer of the other is sent."""
START_S = 180.0
"""Time for a place and for the start of its process."""
SETTLE_S = 10.0
"""Time until a cluster tells what it has."""
CLOSED = "the pipeline was closed"


class Holder:
    """An actor's class: a process that holds one object."""

    def __init__(self) -> None:
        self._object: Any = None

    def make(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Make the object."""
        self._object = function(*arguments)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """What a method of the object gives."""
        return getattr(self._object, method)(*arguments)


class RayHost:
    """One such process.

    Args:
        actor: Ray's handle of it.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object gives.

        A process that does not answer, because it is stopped or its node is busy, is asked again; every
        method may be asked twice.

        Raises:
            HostDiedError: the process is dead.
            Exception: what the method raises.
        """
        return self._value(lambda: self.actor.call.remote(method, arguments))

    def make(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Make the object; raises as `call` does."""
        self._value(lambda: self.actor.make.remote(function, arguments))

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method and wait for nothing."""
        self.actor.call.remote(method, arguments)

    @staticmethod
    def _value(ask: Callable[[], Any]) -> Any:
        try:
            return answer(ask)
        except RayTaskError as error:  # first, since Ray makes it a subclass of what the method raised
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise HostDiedError(reason(error)) from None


class RayHosts:
    """Room for such processes in a cluster, which is left when they are closed.

    Args:
        cluster: the cluster.
        device: ``cuda`` gives each process a GPU.
        cpus: CPUs of each process; also the threads that it computes with.
    """

    def __init__(self, cluster: "RayCluster", device: str, cpus: float) -> None:
        self._cluster = cluster
        self._cpus = cpus
        self._actors: list[Any] = []
        self._closed = False
        self.device = device
        self.threads = max(1, math.floor(cpus))

    def room(self) -> int:
        """How many processes there is room for now, in all nodes together.

        A cluster that has just started, or whose last processes have just ended, is given some seconds.
        """
        until = time.monotonic() + SETTLE_S
        while not (found := self._room()) and time.monotonic() < until:
            time.sleep(ASK_AGAIN_S)
        return found

    def _room(self) -> int:
        free = ray.available_resources()
        by_cpu = math.floor(free.get("CPU", 0.0) / self._cpus + 1e-6)
        return min(by_cpu, int(free.get("GPU", 0.0))) if self.device == "cuda" else by_cpu

    def start(self, make: Callable[..., Any], *arguments: Any) -> RayHost:
        """Start a process and make its object there.

        Raises:
            PlacementError: there is no room for it.
            HostDiedError: the process died meanwhile.
            Exception: what `make` raises.
        """
        if self._closed:
            raise HostDiedError(CLOSED)
        gpus = 1 if self.device == "cuda" else 0
        actor = ray.remote(num_cpus=self._cpus, num_gpus=gpus, max_concurrency=AT_ONCE)(Holder).remote()
        self._actors.append(actor)
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=START_S)
        except GetTimeoutError:
            ray.kill(actor)
            wanted = f"{self._cpus:g} CPU" + (" and a GPU" if gpus else "")
            raise PlacementError(
                f"no process with {wanted} started in the cluster within {START_S:g} s: others use them, or a node is "
                "gone: start it again, or lower evaluation.stages"
            ) from None
        except RayActorError as error:
            raise HostDiedError(reason(error)) from None
        host = RayHost(actor)
        host.make(make, arguments)
        return host

    def close(self) -> None:
        """End all processes, and leave the cluster."""
        if self._closed:
            return
        self._closed = True
        for actor in self._actors:
            ray.kill(actor)
        self._cluster.close()
