"""What we need of Ray Train (2.60) that it does not offer in public,
each with its reason; pinned by that version.

A block's attempt is what Ray's `TorchTrainer` makes but for six things: helper processes less; controllers
of all attempts of a command are in one process; what a failed start or a dead controller held is given back;
a lost node is told apart from a crash; one worker alone opens no port; and no controller imports PyTorch,
which was half of the time that it took to start.
So nothing here imports PyTorch, nor `ray.train.torch`, before it runs in a worker.
"""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dbtrain.coordinator.exit_reasons import CONTROLLERS_DIED, NODE_DIED, SILENT_S, UNREACHABLE

RELEASE_S = 60.0
"""How long a process may take to give back what a dead controller held."""
CONTROLLERS = {
    # a warning that its event loop is blocked, which it is not
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # each controller would set up the logging of the whole process anew;
    # two at once wait for each other for ever
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}
"""Environment of the process that has the controllers."""
ASK_AGAIN_S = 1.0
"""Pause after which a process that does not answer is asked again."""
MOST_ATTEMPTS = 10_000
"""How many attempts one process controls at once; each has a thread there, made when it is needed."""
LEAVE_S = 30.0
"""How long workers have to leave their process group; as long as Ray's own backend gives them."""
SHORT, WHOLE = 500, 4000
"""Characters of an exception in a message, and in what is kept of it."""
TRACEBACK = "Traceback (most recent call last)"
"""Begins a traceback."""


def reason(error: BaseException, longest: int = SHORT) -> str:
    """The innermost cause of an exception of Ray that says something, as one line of so many characters; in a
    short one a traceback that stands in its text is left out but for its last line."""
    chain = [error]
    while cause := _cause(chain[-1]):
        chain.append(cause)
    failures = getattr(error, "worker_failures", None)
    worst = next(iter(failures.values())) if failures else chain[-1]
    # its message begins with half a page about the worker, before the cause
    worst = getattr(worst, "health_check_failure", worst)
    lines = [line.strip() for line in str(worst).splitlines() if line.strip()]
    shown = _without_traceback(lines) if longest <= SHORT else lines
    return f"{type(worst).__name__}: {' '.join(shown)[:longest]}"


def _without_traceback(lines: list[str]) -> list[str]:
    at = next((number for number, line in enumerate(lines) if TRACEBACK in line), None)
    return lines if at is None else [*lines[:at], lines[at].partition(TRACEBACK)[0].strip(), lines[-1]]


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or getattr(error, "cause", None) or getattr(error, "controller_failure", None)


class TrainControllers:
    """An actor's class: the process that has the controllers of Ray Train, each in a thread of its own.

    Ray Train starts a process for each of them, which imports Ray Train before it does anything. A controller
    waits in blocking calls, up to days for its resources, so that they cannot share an event loop.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MOST_ATTEMPTS)
        self._attempts: dict[str, asyncio.Future[Any]] = {}

    async def run(self, name: str, wanted: dict[str, Any]) -> Any:
        """Control one attempt to its end; asked again by the same name, go on waiting for its end.

        Args:
            name: of this attempt alone.
            wanted: arguments of Ray Train's controller.
        """
        if name not in self._attempts:
            begun = asyncio.get_running_loop().run_in_executor(self._threads, _control, wanted)
            self._attempts[name] = begun
        return await asyncio.shield(self._attempts[name])


def _control(wanted: dict[str, Any]) -> Any:
    controller = TrainController(**wanted)
    asyncio.run(controller.run())
    return controller.get_result()


def _attached(actor: Any, name: str, wanted: dict[str, Any]) -> Any:
    """The end of an attempt, for which an actor that does not answer is asked again.

    Ray calls an actor unavailable whose process is frozen, or busy for long. Its workers train on, and it
    controls them again once it runs. If it is dead, Ray says so in the end.
    """
    return answer(lambda: actor.run.remote(name, wanted))


def answer(ask: Callable[[], Any]) -> Any:
    """An actor's answer; one that does not answer, but is not dead, is asked again."""
    while True:
        try:
            return ray.get(ask())
        except ActorUnavailableError as error:
            if isinstance(error, RayTaskError):  # of what it was asked, as Ray tells it
                raise
            time.sleep(ASK_AGAIN_S)


class ControllersDied(Exception):
    """The process of a command's controllers is dead."""


class ControllerProcess:
    """The process of a command's controllers: started for its first attempt, and again once it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actor: Any = None

    def run(self, wanted: dict[str, Any]) -> Any:
        """Control one attempt to its end, and return Ray Train's result of it.

        Args:
            wanted: arguments of Ray Train's controller, by name.

        Raises:
            ControllersDied: the process died, and with it the attempts that it controlled.
        """
        with self._lock:
            actor = self._actor = self._actor or self._start()
        try:
            return _attached(actor, uuid.uuid4().hex, wanted)
        except RayActorError as error:
            if isinstance(error, RayTaskError):  # of a worker, as its controller tells it
                raise
            with self._lock:  # in which all others that it controlled wait until their resources are free
                if self._actor is actor:
                    self._actor = None
                    release_orphans()
            raise ControllersDied(f"{CONTROLLERS_DIED} {reason(error)}") from None

    @staticmethod
    def _start() -> Any:
        """Start it where Ray Train does: on the node of the command, or of Ray Client's server."""
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        variables = {**get_env_vars_to_propagate(), **CONTROLLERS}
        actor = ray.remote(num_cpus=0, max_concurrency=MOST_ATTEMPTS, label_selector=here)(TrainControllers)
        return actor.options(runtime_env={"env_vars": variables}).remote()


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer with its controller beside those of other attempts, and without four helpers.

    Each of these is a process that starts beside the workers.
    One hands out Ray's own data sets. One gives a dead controller's resources back, but asks the dashboard
    who is dead: without one it does nothing, and holds up the end of every attempt for 12 s;
    `release_orphans` does it here. One asks an autoscaler for nodes, as the placement groups do already. One
    lets workers wait for each other in `ray.train.report`, which they never call.

    Args:
        controllers: the process in which its controller runs.
        arguments: of Ray Train's trainer.
    """

    def __init__(self, controllers: ControllerProcess, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._controllers = controllers

    def _create_default_callbacks(self) -> list[Any]:
        unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]
        return [StartGuard(), *kept]

    def _initialize_and_run_controller(self, **wanted: Any) -> Any:
        return self._controllers.run({**wanted, "scaling_policy": FixedSize(self.scaling_config)})


class FixedSize(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as were asked for, without a word to the process that asks an autoscaler for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called when the controller is there: makes no client of that process."""

    def _maybe_send_resource_request(self) -> None:
        """Called at every decision."""


class NobodyWaits:
    """Stands where Ray Train has the actor by which `ray.train.report` lets workers wait for each other."""

    @classmethod
    def options(cls, **_: Any) -> type["NobodyWaits"]:
        """As of an actor's class."""
        return cls

    @classmethod
    def remote(cls, **_: Any) -> "NobodyWaits":
        """As of an actor's class; starts no process."""
        return cls()


def _start_no_actor_for_reports() -> None:
    """Called in the controller, before its workers start."""
    worker_group.SynchronizationActor = NobodyWaits
    state._shutdown_sync_actor = lambda actor: None


class StartGuard(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """What Ray Train forgets when workers die; lives in the controller.

    It must be the first callback: those after it may fail.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._nodes: set[str] = set()
        self._error: Any = None

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Around the start; why it failed would be lost on the way to the driver,
        where it tells a lost node."""
        _start_no_actor_for_reports()
        try:
            yield
        except WorkerGroupStartupFailedError as error:
            raise WorkerGroupStartupFailedError(f"the workers did not start: {reason(error, WHOLE)}") from error

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called when the workers are there, and before anything else is done with them."""
        self._group = worker_group
        self._nodes = {worker.metadata.node_id for worker in worker_group.get_workers()}

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called at every change of the controller's state; the
        one before its shutdown has the error it will tell."""
        self._error = getattr(getattr(current_state, "next_state", None), "training_failed_error", self._error)

    async def before_controller_shutdown(self) -> None:
        """Give back the placement group of workers that died later in the start,
        which the controller never got.

        And tell a lost node: of several nodes the workers elsewhere raise at once, when their connections
        break, and a worker alone does not answer any more; Ray Train ends the attempt long before Ray finds
        the node dead.
        """
        if self._group is not None and self._group.has_started():
            self._group.shutdown()
        if isinstance(self._error, WorkerGroupError):
            told = reason(self._error, WHOLE)
            if (len(self._nodes) > 1 or UNREACHABLE in told) and await _lost_one(self._nodes):
                self._error.worker_failures = {0: RuntimeError(f"{NODE_DIED}; before that was known: {told}")}


async def _lost_one(nodes: set[str]) -> bool:
    """Whether one of these nodes is dead; waits for each to answer or to be found dead."""
    ask = ray.remote(num_cpus=0, max_retries=0)(_answer)
    waiting = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    }
    until = time.monotonic() + SILENT_S
    while waiting and time.monotonic() < until:
        await asyncio.sleep(0.5)
        if nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            return True
        waiting = {node: call for node, call in waiting.items() if not _answered(call)}
    return False


def _answer() -> None:
    """All that a node has to do to be alive."""


def _answered(call: Any) -> bool:
    try:
        ray.get(call, timeout=0)
    except Exception:  # not yet, or its node is going
        return False
    return True


def release_orphans() -> None:
    """Give back what controllers of this job held that died without doing so;
    Ray itself waits for the job's end."""
    task = ray.remote(num_cpus=0, max_retries=2)(_remove_orphaned_groups)
    try:
        ray.get(task.remote(), timeout=RELEASE_S)
    except Exception:  # the cluster is going away, and takes all groups along
        return


def _remove_orphaned_groups() -> None:
    job = ray.get_runtime_context().get_job_id()
    accessor = ray._private.state.state._connect_and_get_accessor()
    for content in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(content)
        ours = group.creator_job_id.hex() == job and not group.is_detached
        if ours and group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


class ProcessGroup(Backend):  # type: ignore[misc]
    """Process group of a block's workers; one worker alone gets a store in its own memory.

    PyTorch's TCP store listens on all addresses, without authentication, whatever address it is given.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: "ProcessGroupConfig") -> None:
        """Called by Ray Train when the workers of an attempt are there."""
        worker_group.execute(_choose_device, backend_config.backend)
        if len(worker_group) > 1:
            from ray.train.torch.config import TorchConfig, _TorchBackend

            _TorchBackend().on_start(worker_group, TorchConfig(backend=backend_config.backend))
            return
        worker_group.execute(_tell_ranks)
        worker_group.execute(_join_alone, backend_config.backend)

    def on_shutdown(self, worker_group: Any, backend_config: "ProcessGroupConfig") -> None:
        """Called by Ray Train at the end of an attempt; it ends the workers' processes after it."""
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_S)
        except GetTimeoutError:
            return


@dataclass
class ProcessGroupConfig(BackendConfig):  # type: ignore[misc]
    """Tells Ray Train to make :class:`ProcessGroup`.

    Args:
        backend: PyTorch's name of it: ``gloo`` or ``nccl``.
    """

    backend: str

    @property
    def backend_cls(self) -> type[ProcessGroup]:
        """What Ray Train makes the group with."""
        return ProcessGroup

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Around the training in a worker."""
        return _on_own_gpu


@contextmanager
def _on_own_gpu() -> Iterator[None]:
    """PyTorch's current device is the GPU that Ray gave to this worker, if it gave one."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def _choose_device(backend: str) -> None:
    """Choose the device before anything asks for GPUs: DeepSpeed and CUDA look once,
    and Ray hides no GPU from a process that asked for none."""
    os.environ["DS_ACCELERATOR"] = "cuda" if backend == "nccl" else "cpu"
    if backend != "nccl":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _tell_ranks() -> None:
    """Set PyTorch's variables RANK, WORLD_SIZE and so on in this worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()


def _leave(several: bool) -> None:
    """Leave the process group, where there are others in it, and give the memory of GPUs back."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=several)


def _join_alone(backend: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
