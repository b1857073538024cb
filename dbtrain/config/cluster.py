"""Section `cluster`: where blocks run, and when they start again."""

from typing import Annotated, Literal

from pydantic import Field

from dbtrain.config.section import ByBlock, Count, Positive, Section


class BlockResources(Section):
    """What one block asks of the cluster; unset values are those of `cluster`."""

    workers: Count | None = None
    """Workers of this block."""
    gpus_per_worker: Positive | None = None
    """GPUs of each of its workers."""
    cpus_per_worker: Positive | None = None
    """CPUs of each of its workers."""
    micro_batch: Count | None = None
    """Samples that each of its workers takes at a time, where its GPU is not as large as others."""
    resources: dict[str, float] | None = None
    """Custom Ray resources of each of its workers, by which it is bound to the nodes that have them."""


class ClusterConfig(Section):
    """Where blocks run."""

    address: str | None = None
    """Ray cluster: `auto`, `host:port`, `ray://host:port`, or none to start one on this machine alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count = 1
    """Workers of a block: more than one trains it data-parallel, sharded by training.zero_stage."""
    gpus_per_worker: Positive = 1.0
    """GPUs of a worker, when it uses GPUs; a fraction shares one."""
    cpus_per_worker: Positive = 1.0
    """CPUs of a worker, and on a CPU the threads that it computes with."""
    resources: dict[str, float] = {}
    """Custom Ray resources that every worker asks for."""
    blocks: ByBlock[BlockResources] = {}
    """Exceptions for single blocks."""
    max_crashes: Annotated[int, Field(ge=0)] = 3
    """Restarts of a block after crashes without progress between them."""
    max_preemptions: Annotated[int, Field(ge=0)] = 100
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Pause before the second restart without progress; doubles with each further one, at most 60 s."""
    hang_timeout_s: Positive = 600.0
    """Longest time without a step before a block is ended and restarted,
    beside reading and writing checkpoints, and compiling."""
    restart_damaged: bool = False
    """Train a block again from its first step when all its checkpoints are damaged;
    otherwise it fails and says so."""
    restart_optimizer: bool = False
    """Train a block on from a checkpoint without its optimizer's state, which then starts anew: the result is
    not that of training without a break. Otherwise such a block fails and says so."""
