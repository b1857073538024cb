"""Connect to a cluster with the settings in place, which Ray reads when it is imported."""

import os
from typing import TYPE_CHECKING

import torch

from dbtrain.coordinator.placement import Node
from dbtrain.coordinator.ray.address import check_address
from dbtrain.coordinator.ray.settings import prepare

if TYPE_CHECKING:
    from dbtrain.coordinator.ray.cluster import RayCluster


def connect(address: str | None) -> "RayCluster":
    """Connect to the cluster at `address`, or start one of this machine's own.

    Raises:
        PlacementError: there is none.
        ConfigError: the address is none.
        VersionError: the cluster has another version of Ray or Python.
    """
    prepare(address, check_address(address))
    from dbtrain.coordinator.ray.cluster import RayCluster

    return RayCluster(address)


def this_machine() -> Node:
    """What a cluster of this machine's own would have, without starting one."""
    gpus = float(torch.cuda.device_count())
    return Node("this machine", {"CPU": float(os.cpu_count() or 1), **({"GPU": gpus} if gpus else {})})
