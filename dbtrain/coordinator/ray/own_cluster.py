"""A Ray of this command's own: started out of reach of the signals that end the command, and watched.

Whoever ends a command by its process group (`kill -TERM -PGID`, `timeout`, a script) means the command, which
then asks its workers to commit and leave. Ray's processes, in the same group, would end at once and take the
workers along.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import ray
from ray._private import services
from ray._private.node import Node

from dbtrain.errors import PlacementError

DAEMONS = ("gcs_server", "raylet")
"""No worker goes on without either of them; 5 s after the first has ended, Ray ends this process too,
and nothing is said."""

HELPERS = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods that start what is left out."""


def start(arguments: dict[str, Any]) -> list[psutil.Process]:
    """Start Ray on this machine and connect to it; returns its processes that a command cannot do without."""
    with _in_sessions_of_their_own(), _without_helpers():
        ray.init(address="local", include_dashboard=False, **arguments)
    return [child for child in psutil.Process().children() if child.name() in DAEMONS]


@contextmanager
def _in_sessions_of_their_own() -> Iterator[None]:
    """Ray 2.60 starts its processes with this class, and has no setting. They still end with this process."""
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Leave out what a cluster of one machine has no use for; Ray 2.60 has no setting for it.

    These are three Python processes: one asks a cloud for more nodes, one sends the workers' logs to this
    process, which asks for none (`log_to_driver`), and one takes jobs and serves the dashboard.
    """
    started = {name: getattr(Node, name) for name in HELPERS}
    for name in HELPERS:
        setattr(Node, name, lambda node, **arguments: None)
    try:
        yield
    finally:
        for name, method in started.items():
            setattr(Node, name, method)


def check_alive(daemons: list[psutil.Process]) -> None:
    """Make sure that Ray's processes are there.

    Raises:
        PlacementError: one has ended.
    """
    if not all(daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE for daemon in daemons):
        raise PlacementError(
            "the Ray that this command started has ended, and its workers with it: it was sent a signal too, or the "
            "machine had no memory left; the same command continues from the last commits"
        )
