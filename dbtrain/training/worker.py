"""One rank of an attempt: build the block, resume it from its newest commit, train it, and commit."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbtrain.config import parse_config
from dbtrain.data.splits import Split
from dbtrain.errors import WorkerError
from dbtrain.method.split import global_name, local_name
from dbtrain.run.batch_shape import block_batch
from dbtrain.run.initial_weights import new_names, read_block
from dbtrain.run.run import BRANCH, Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.format import ROLES
from dbtrain.shards.storage.errors import DamagedError
from dbtrain.shards.storage.fence import check
from dbtrain.telemetry.events import EventLog
from dbtrain.training.assignment import Assignment
from dbtrain.training.async_writer import BackgroundWriter
from dbtrain.training.batches import Batches
from dbtrain.training.compilation import compilations
from dbtrain.training.engine import Engine
from dbtrain.training.fault_injection import FaultPlan
from dbtrain.training.host_copies import Snapshot
from dbtrain.training.loop import Report, train
from dbtrain.training.resumption import Resumption, patience
from dbtrain.training.upstream import load_upstream
from dbtrain.training.watchdog import StopRequest, Watchdog
from dbtrain.training.worker_sync import WorkerSync

MODEL_PREFIX = "model."
"""Beginning of the objective's parameter names, which wrap the model's."""
NOT_THE_SAME_BITS = "training.deterministic=false: a block that is resumed does not end in the bits of one that is not"


class BlockWorker:
    """One rank of one attempt of one block; observes the loop.

    Args:
        assignment: what the coordinator told this worker.
        rank: within the block; rank 0 writes.
        stop: set when the worker is asked to commit and leave.
        log: event log of the attempt.
        node: what its first event says of the node that it runs on, besides the host.
    """

    def __init__(
        self,
        assignment: Assignment,
        rank: int,
        stop: StopRequest,
        log: EventLog,
        node: Mapping[str, str] | None = None,
    ) -> None:
        self.node = node or {}
        self.assignment = assignment
        self.rank = rank
        self.stop = stop
        self.of_run = run = Run.at(assignment.run_url)
        self.run_plan = run.plan
        if assignment.config is not None:
            self.run_plan = replace(self.run_plan, config=parse_config(assignment.config, "the assignment"))
        self.config = self.run_plan.config
        self.training = self.config.training.of_block(assignment.block)
        block = run.block(assignment.block)
        self.store, self.identity = block.store, block.identity
        self.schedule = self.run_plan.schedule(assignment.block)
        self.checkpoints = Checkpoints(self.store, self.identity, self.training.keep, self.schedule.held)
        self.log = log
        self.step: int | None = None
        """Steps done when the one under way began, None before the first."""
        self._told_stopping = False
        self.writer = BackgroundWriter()
        self.faults = FaultPlan.from_environment(BRANCH if run.manifest.branch else assignment.block, self.store)
        self.watchdog = Watchdog(run.store, self.store, assignment, stop, None if rank else log)
        cuda = assignment.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.sync = WorkerSync(assignment.workers, stop, self.device)

    def run(self) -> str:
        """Train to the end or until asked to stop; returns the outcome.

        Raises:
            DbtrainError: nothing that another attempt would fix.
        """
        where = {"host": os.uname().nodename, **self.node, "place": self.assignment.place}
        self._emit("start", rank=self.rank, pid=os.getpid(), **where, device=str(self.device))
        if not self.training.deterministic:
            torch.use_deterministic_algorithms(False)
            self._note(NOT_THE_SAME_BITS)
        # before anything that may compile or wait for others: a start that hangs ends as well
        self.watchdog.start()
        try:
            return self._train()
        finally:
            try:
                with self.watchdog.patient():
                    # waits for the last commit: the end is not told before that is durable
                    self.writer.close()
            finally:
                self.watchdog.close()

    def _train(self) -> str:
        assignment = self.assignment
        shape = block_batch(self.config.training, assignment.block, assignment.workers, assignment.micro_batch)
        self._objective = objective = self.run_plan.objective(assignment.block).to(self.device)
        upstream = self.run_plan.scheme.sources(assignment.block)[:-1]
        if upstream:
            with self.watchdog.patient():
                load_upstream(objective.get_submodule("model"), self.of_run, upstream)
        data = self.run_plan.data()
        self.watchdog.touch()
        engine = Engine(objective, self.training, shape.micro_batch, shape.accumulation, shape.workers, self._note)
        start = self._resume(engine)
        batches = Batches(
            data.train, shape, self.config.seed, assignment.block, self.rank, self.device, self.training.augmentation
        )
        self._measure = partial(_measured, engine, batches, data.validation)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in objective.parameters() if p.requires_grad)
        self._emit(
            "ready", step=start, parameters=parameters, world_size=dist.get_world_size(), zero_stage=engine.zero_stage
        )
        with compilations(self.watchdog.compiling, self._compiled) if self.training.compile else nullcontext():
            return train(engine, batches, self.training, self.schedule, start, self, self.should_stop)

    def _compiled(self, seconds: float) -> None:
        self.watchdog.touch()
        if seconds > 1:  # of a score of small graphs nobody wants a line each
            self._emit("compiled", seconds=round(seconds, 3))

    def _resume(self, engine: Engine) -> int:
        cluster, assignment = self.config.cluster, self.assignment
        limit = patience(assignment.hang_timeout_s)
        resumption = Resumption(self.checkpoints, self.sync, assignment.block, cluster.restart_damaged, limit)
        with self.watchdog.patient():
            loaded = resumption.find(self.rank, lambda line: self._emit("skipped", reason=line))
        if loaded is None:
            self._begin(engine)
            return 0
        if "optim" not in loaded.parts and loaded.step < self.training.steps:
            self._without_optimizer(loaded.step)
        engine.restore({role: _rename(part, self._local) for role, part in loaded.parts.items()}, loaded.step)
        self._emit("resumed", step=loaded.step, loss=loaded.commit.loss)
        return loaded.step

    def _begin(self, engine: Engine) -> None:
        """Take the weights that the run starts from; only a block without a checkpoint needs them."""
        origin = self.run_plan.init
        if origin is None:
            if self.config.init.branch:
                raise WorkerError(f"run.json of {self.of_run.store.url} names no branch to start from: train it first")
            return
        own = [name.removeprefix(MODEL_PREFIX) for name in engine.names]
        block, first_layer = self.assignment.block, self.identity.layers[0]
        weights = read_block(self.of_run, origin, block, first_layer, own)
        try:
            with self.watchdog.patient():
                named = ((MODEL_PREFIX + name, tensor) for name, tensor in weights)
                engine.begin(named, origin.where, {MODEL_PREFIX + name for name in new_names(origin, block, own)})
        except DamagedError as error:
            raise WorkerError(f"block {block} cannot start from init.from: {error}, or start another run") from error
        self._emit("initialised", source=origin.blocks[block].told(origin.where))

    def _without_optimizer(self, step: int) -> None:
        if not self.config.cluster.restart_optimizer:
            raise WorkerError(
                f"block {self.assignment.block} was done at step {step} and gave up its optimizer's state "
                "(training.keep_optimizer=false), so it cannot be trained on as if without a break: set "
                "cluster.restart_optimizer=true to train it on with an optimizer that starts anew"
            )
        self._note(f"trained on from step {step} with an optimizer that starts anew (cluster.restart_optimizer=true)")

    def _local(self, name: str) -> str:
        return MODEL_PREFIX + local_name(self.assignment.block, name)

    def _global(self, name: str) -> str:
        return global_name(self.assignment.block, name.removeprefix(MODEL_PREFIX))

    def before_step(self, step: int) -> None:
        """Faults that a test has planned for this step."""
        self.watchdog.touch()
        self.step = step
        if self.faults.planned(step):
            self.writer.drain()  # so that a test knows what is committed
            self.faults.at_step(step)
            self.faults.gradient(step, self._objective)

    def see_loss(self, step: int, loss: Tensor) -> Tensor:
        """The mean over the block's workers."""
        return self.sync.mean(self.faults.loss(step, loss))

    def progress(self, step: int, report: Report) -> None:
        """One event a log interval."""
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _resident_peak()
        fields = {name: value for name, value in asdict(report).items() if value is not None}
        self._emit("step", step=step, memory=memory, **{**fields, "seconds": round(report.seconds, 4)})

    def validate(self, step: int) -> None:
        """One event with the loss on validation samples."""
        started = time.monotonic()
        with self.watchdog.patient():
            loss = self.sync.average(self._measure()).item()
        weights = "ema" if self.training.ema else "model"
        self._emit("validation", step=step, loss=loss, weights=weights, seconds=round(time.monotonic() - started, 4))

    def commit(self, step: int, take: Callable[[], Snapshot], loss: float) -> None:
        """Hand a snapshot to the background writer; the event follows when it is durable."""
        started = time.monotonic()
        with self.watchdog.patient():
            # Free the waiting snapshot first, so that the new one can use its memory: there are at most two,
            # and the other may be being written.
            self.writer.drop_waiting()
            snapshot = take()
            if self.rank:
                snapshot.release()
                return
            self.writer.submit(lambda: self._write(step, snapshot, loss), snapshot.release)
        seconds = time.monotonic() - started
        if seconds > 1:
            self._emit("stall", step=step, seconds=round(seconds, 3))

    def _write(self, step: int, snapshot: Snapshot, loss: float) -> None:
        """Commit a snapshot, on the writer's thread."""
        started = time.monotonic()
        last = step == self.training.steps and not self.training.keep_optimizer
        try:
            snapshot.wait()
            parts = {role: part for role, part in snapshot.parts.items() if not (last and role == "optim")}
            self.checkpoints.commit(
                step,
                {role: _rename(parts[role], self._global) for role in ROLES if role in parts},
                loss=loss,
                attempt=self.assignment.attempt,
                from_place=self.assignment.place,
                fence=self.faults.in_commit(step, self._fence),
            )
            if last:
                self._fence()  # what is below may be another attempt's by now
                self.checkpoints.keep_only(step)
        finally:
            snapshot.release()
        self._emit("commit", step=step, loss=loss, seconds=round(time.monotonic() - started, 4))

    def _note(self, line: str) -> None:
        self._emit("note", reason=line)

    def _fence(self) -> None:
        check(self.store, self.assignment.token)

    def should_stop(self, step: int) -> bool:
        """Whether to commit and leave after `step`; all ranks of the block decide alike."""
        self._tell_stopping(step)
        stops = self.sync.stops()
        self._tell_stopping(step)
        return stops

    def _tell_stopping(self, step: int) -> None:
        """Said before the commit: after a warning the process may be gone before it can say how it ended."""
        if self.stop.requested and not self._told_stopping:
            self._told_stopping = True
            self._emit("stopping", step=step, reason=self.stop.reason)

    def _emit(self, event: str, **fields: Any) -> None:
        if self.rank == 0:
            self.log.tell(event, **fields)


def _measured(engine: Engine, batches: Batches, split: Split) -> Tensor:
    """Loss of this worker's part of some samples."""
    return engine.measure(batches.fixed(split))


def _rename(part: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Rename the parameter in each key; optimizer states carry theirs as ``<state>/<name>``."""
    renamed = {}
    for key, tensor in part.items():
        state, slash, name = key.rpartition("/")
        renamed[f"{state}{slash}{rename(name)}"] = tensor
    return renamed


def _resident_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
