"""Where the processes of an evaluation's pipeline run."""

from typing import TYPE_CHECKING

from dbtrain.config import Config
from dbtrain.coordinator.placement import choose_device
from dbtrain.coordinator.ray.address import connect
from dbtrain.models.registry import own_architecture

if TYPE_CHECKING:
    from dbtrain.coordinator.ray.hosts import RayHosts


def open_hosts(config: Config) -> "RayHosts":
    """Room for the processes of a pipeline, in the cluster at `cluster.address` or one of this machine's own.

    Raises:
        ConfigError: the address is none.
        PlacementError: no cluster answers, or a GPU was demanded where there is none.
        VersionError: the cluster has another version of Ray or Python.
    """
    network = own_architecture(config.model.arch)
    cluster = connect(config.cluster.address, [network.shipped] if network else [])
    try:
        device = choose_device(config.cluster.device, cluster.nodes())
        return cluster.hosts(device, config.cluster.cpus_per_worker)
    except BaseException:
        cluster.close()
        raise
