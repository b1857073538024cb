"""Settings that must be in the environment before Ray, or in a worker PyTorch, is imported."""

import os
import secrets

PASSIVE = ("OMP_WAIT_POLICY", "PASSIVE")
"""OpenMP's threads wait without spinning: where others use the machine too, threads that spin take the time
of those that they wait for (docs/log.md has the figures)."""
SETTINGS = {
    # without these three a node that was cut off trains on for minutes after its replacement has started
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # the heartbeat: a worker process that is stopped or swapped out and answers nothing;
    # ten minutes by default
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    # waiting for resources is no error, however long it takes (a week):
    # others hold them, or the node is not back yet
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "604800",
    # half a page about every worker that died, between our lines, which say it themselves
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed while executing a task",
    # without it the next call after a lost connection quietly joins,
    # or starts, another cluster on this machine
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # helpers that we have no use for; without them four trainers start in 31 s and not in 40
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # an idle process for each CPU, which no trainer can use: theirs have an environment of their own
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **dict([PASSIVE]),
}

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for "this machine only": its address becomes 127.0.0.1, where otherwise a dozen ports are
opened to all. An address given to `ray.init` does not do it, because Ray replaces 127.0.0.1 by one that
others can reach."""


def prepare(address: str | None, loopback: bool) -> None:
    """Set what is not set.

    A cluster of this command's own is closed to other users of the machine by a token,
    and to other machines because it listens on the loopback address only.

    Args:
        address: address of a cluster, or None for an own one.
        loopback: whether it listens there only; Ray would look for it at an address that others can reach.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if loopback:
        os.environ.update(LOOPBACK)
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
