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


def prepare_process(assignment: Assignment) -> None:
    """Settings of the process on which bitwise repetition depends; before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_compiled_code()
    torch.set_num_threads(assignment.threads)
    # not warn_only: the backward pass of attention on a GPU then adds up in any order,
    # with nothing but a warning
    torch.use_deterministic_algorithms(True)
    # filling finds programs that read memory before they write it,
    # and tests do so; ZeRO's buffers cost time every step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if assignment.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


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
