"""Connect to a cluster with the settings in place, which Ray reads when it is imported."""

from typing import TYPE_CHECKING

from dbtrain.coordinator.address import check_address
from dbtrain.coordinator.ray_settings import prepare

if TYPE_CHECKING:
    from dbtrain.coordinator.ray import RayCluster


def connect(address: str | None) -> "RayCluster":
    """Connect to the cluster at `address`, or start one of this machine's own.

    Raises:
        PlacementError: there is none.
        ConfigError: the address is none.
        VersionError: the cluster has another version of Ray or Python.
    """
    prepare(address, check_address(address))
    from dbtrain.coordinator.ray import RayCluster

    return RayCluster(address)
