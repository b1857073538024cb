"""A worker's entry: prepare the process, train one rank of an attempt, and record how it ended."""

import os
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from dbtrain.errors import DbtrainError, FencedError, FirstWorkerError, ShardError
from dbtrain.run.run import Run
from dbtrain.telemetry.events import EventLog
from dbtrain.training.assignment import Assignment
from dbtrain.training.compilation import keep_compiled_code
from dbtrain.training.watchdog import StopRequest
from dbtrain.training.worker import BlockWorker

WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = ":4096:8"
"""PyTorch refuses matrix products in its deterministic mode without such a value."""


def prepare_process(assignment: Assignment) -> None:
    """Settings of the process on which bitwise repetition depends; before the first CUDA call."""
    os.environ.setdefault(WORKSPACES, DETERMINISTIC_WORKSPACES)
    keep_compiled_code()
    torch.set_num_threads(assignment.threads)
    # not "warn": the backward pass of attention on a GPU then adds up in any order, with just a warning;
    # these two are what use_deterministic_algorithms sets, which imports the compiler for the second one:
    # a second in every worker's start, also where nothing is compiled
    torch.set_deterministic_debug_mode("error")
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    # filling finds programs that read memory before they write it,
    # and tests do so; ZeRO's buffers cost time every step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if assignment.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        _check_workspaces_once(torch.device("cuda", torch.cuda.current_device()))


def _check_workspaces_once(device: torch.device) -> None:
    """Let PyTorch look at the workspaces now, and take the variable away.

    It checks the variable at the first matrix product, and up to PyTorch 2.11 at least parses it by a
    regular expression at every one, 0.1 ms of the host each. Bits do not depend on it: PyTorch gives cuBLAS a
    workspace of its own for each stream, as cuBLAS's documentation on reproducibility asks.
    """
    if os.environ.get(WORKSPACES) != DETERMINISTIC_WORKSPACES:
        return  # somebody wants other sizes
    one = torch.ones(8, 8, device=device)
    one.mm(one)
    del os.environ[WORKSPACES]
    try:
        one.mm(one)
    except RuntimeError:  # of a version that checks it each time
        os.environ[WORKSPACES] = DETERMINISTIC_WORKSPACES


def work(assignment: Assignment, rank: int, stop: StopRequest, node: Mapping[str, str] | None = None) -> None:
    """Run one rank of an attempt and record how it ended.

    Errors that another attempt would meet again are recorded as ``failed``, and raised only where there are
    other ranks: those would wait for this one in a collective, and Ray ends them when one raises. All others
    are raised, so that the coordinator sees a crash.

    Args:
        assignment: what the coordinator told this worker.
        rank: within the block.
        stop: set when the worker is asked to commit and leave.
        node: what its first event says of the node: Ray's id as ``node``, and its ``address``.
    """
    attempt = Run.at(assignment.run_url).block(assignment.block).attempt(assignment.attempt)
    log = EventLog(attempt, rank)

    def end(outcome: str, **fields: Any) -> None:
        if rank == 0:
            log.emit("end", outcome=outcome, reason=stop.reason, **fields)
        elif "error" in fields:  # only the first rank commits, so only it knows that all is done
            log.emit("end", outcome=outcome, reason=stop.reason, rank=rank, **fields)

    prepare_process(assignment)
    worker: BlockWorker | None = None
    try:
        worker = BlockWorker(assignment, rank, stop, log, node)
        end(worker.run())
    except FirstWorkerError:
        return  # raised here as well, it could be told, or end the attempt, before the first one has said why
    except FencedError as error:
        end("fenced", error=str(error))
        if assignment.workers > 1:
            raise
    except DbtrainError as error:
        end("failed", error=str(error), retry=isinstance(error, ShardError))
        if assignment.workers > 1:
            raise
    except Exception as error:
        log.store.append("log.txt" if rank == 0 else f"log-{rank}.txt", traceback.format_exc().encode())
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        end("crashed", error=said, at=worker.step if worker else None)
        raise
