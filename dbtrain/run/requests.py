"""What each block of a run asks of a cluster: workers, and the resources of each."""

from collections.abc import Mapping
from dataclasses import dataclass

from dbtrain.config import ClusterConfig, Config
from dbtrain.errors import ConfigError
from dbtrain.method.schemes import SCHEMES


@dataclass(frozen=True)
class Request:
    """What a block asks for."""

    block: int
    workers: int
    resources: Mapping[str, float]
    """Ray resources of each worker."""
    micro_batch: int | None
    device: str


def requests(config: Config, device: str) -> list[Request]:
    """What each block asks for: the section `cluster` and the block's exceptions;
    one request if one worker has all.

    Raises:
        ConfigError: several workers of a block would share a GPU, or a worker would hold several.
    """
    blocks = 1 if SCHEMES[config.method].shared else config.blocks
    return [_request(config.cluster, config.training.micro_batch, block, device) for block in range(blocks)]


def _request(cluster: ClusterConfig, micro_batch: int | None, block: int, device: str) -> Request:
    own = cluster.blocks.get(block)

    def pick(name: str) -> float:
        value = getattr(own, name) if own else None
        return float(getattr(cluster, name) if value is None else value)

    resources = {"CPU": pick("cpus_per_worker"), **cluster.resources, **((own and own.resources) or {})}
    workers, gpus = int(pick("workers")), pick("gpus_per_worker")
    _check_gpus(block, workers, gpus, device)
    if device == "cuda":
        resources["GPU"] = gpus
    return Request(block, workers, resources, (own and own.micro_batch) or micro_batch, device)


def _check_gpus(block: int, workers: int, gpus: float, device: str) -> None:
    # checked on CPUs too, where it would silently train on less than was asked for
    if gpus > 1:
        raise ConfigError(
            f"block {block} asks for gpus_per_worker={gpus:g}, and a worker computes on one GPU: set "
            f"cluster.workers={gpus:.0f} with cluster.gpus_per_worker=1 (training.zero_stage shards the block over "
            "them)"
        )
    if device == "cuda" and workers > 1 and gpus < 1:
        # Ray may place both on one GPU, and NCCL would fail minutes later with "Duplicate GPU detected"
        raise ConfigError(
            f"block {block} has {workers} workers of gpus_per_worker={gpus:g}, which may share a GPU, and NCCL refuses "
            "that within a block: set gpus_per_worker=1, or workers=1"
        )
