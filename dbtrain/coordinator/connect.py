"""Connect to a cluster with the settings in place, which Ray reads when it is imported."""

import socket
from typing import TYPE_CHECKING

from dbtrain.coordinator.ray_settings import prepare
from dbtrain.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from dbtrain.coordinator.ray import RayCluster

CONNECT_S = 5.0
"""Bounded: a host that drops packets would hold a connection attempt for minutes."""


def connect(address: str | None) -> "RayCluster":
    """Connect to the cluster at `address`, or start one of this machine's own.

    Raises:
        PlacementError: there is none.
        ConfigError: the address is none.
        VersionError: the cluster has another version of Ray or Python.
    """
    if address is not None and address != "auto":
        _refuse_silence(address)
    prepare(address)
    from dbtrain.coordinator.ray import RayCluster

    return RayCluster(address)


def _refuse_silence(address: str) -> None:
    """Ray ends the whole process, without an exception, when nothing listens at an address."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(f"cluster.address={address} is no address: write auto, host:port or ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise PlacementError(
            f"nothing answers at cluster.address={address} ({error}): is Ray started there (ray start --head), on this "
            "port (6379; 10001 for ray://), and may this machine reach it?"
        ) from error
