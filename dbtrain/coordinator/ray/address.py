"""Where a cluster is, found and tried before Ray is asked: Ray ends the whole process where nothing answers."""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from dbtrain.coordinator.placement import Node
from dbtrain.coordinator.ray.settings import LOOPBACK, prepare
from dbtrain.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from dbtrain.coordinator.ray.cluster import RayCluster


CONNECT_S = 5.0
"""Bounded: a host that drops packets would hold a connection attempt for minutes."""
SOCKET_BYTES = 107
"""Linux's limit of a socket's path."""
LONGEST_SOCKET = "/sockets/plasma_store"
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
ELSE = (
    "name a cluster with --address host:port, start one (ray start --head), or leave --address and cluster.address out "
    "for one of this command's own"
)


def check_address(address: str | None) -> bool:
    """Whether the cluster at an address, if one is given, is for this machine only, as that of launchers/local is.

    Raises:
        PlacementError: nothing answers there, or `auto` leads nowhere.
        ConfigError: it is no address, or Ray cannot put its files where this machine's temporary ones go.
    """
    if address is None:
        _check_temporary()
        return True
    found, told, fix = _auto() if address == "auto" else (address, f"cluster.address={address}", ELSE)
    client = found.startswith("ray://")
    host, colon, port = found.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(f"{told} is no address: write auto, host:port or ray://host:port")
    host = host.strip("[]")
    # Ray takes another address for 127.0.0.1, unless it is told that the cluster is for this machine only
    if host in THIS_MACHINE and not client and not _refusal(_own_address(), int(port)):
        return False
    refusal = _refusal(host, int(port))
    if refusal:
        raise PlacementError(
            f"nothing answers at {told} ({refusal}): is Ray started there, on this port (6379; 10001 for ray://), and "
            f"may this machine reach it? {fix[0].upper()}{fix[1:]}"
        )
    return host in THIS_MACHINE and not client


def _check_temporary() -> None:
    """Whether a Ray of this command's own can have its sockets, which lie where `ray start` puts them too.

    Raises:
        ConfigError: the folder's name is too long, or there is no such folder and none can be made.
    """
    name, folder = _temporary()
    told = f"{name}={folder}" if name else folder
    # as Ray 2.60 names it: the time to a microsecond, and the process
    session = f"session_{'0' * len('2026-01-01_00-00-00_000000')}_{os.getpid()}"
    longest = os.fsencode(f"{folder}/ray/{session}{LONGEST_SOCKET}")
    if len(longest) > SOCKET_BYTES:
        room = SOCKET_BYTES - (len(longest) - len(os.fsencode(folder)))
        raise ConfigError(
            f"{told} is too long a path for Ray ({len(os.fsencode(folder))} bytes, at most {room}): the sockets that "
            "it makes below may have 107 bytes in all: set RAY_TMPDIR to a shorter one, such as RAY_TMPDIR=/tmp"
        )
    try:
        os.makedirs(folder, exist_ok=True)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "it may not be written"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ConfigError(
            f"{told} cannot hold the files that Ray makes there ({problem}): set RAY_TMPDIR to a folder that can, such "
            "as RAY_TMPDIR=/tmp"
        )


def _temporary() -> tuple[str | None, str]:
    """Where Ray puts its files, and the variable that says so, if one does."""
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in os.environ), None)
    return name, os.environ[name] if name else "/tmp"


def _auto() -> tuple[str, str, str]:
    """What Ray takes for `auto`, in its order; how messages call it, and what to do where it does not answer.

    Raises:
        PlacementError: there is nothing to take.
    """
    given = os.environ.get("RAY_ADDRESS")
    if given and given != "auto":
        return given, f"RAY_ADDRESS={given} (cluster.address=auto)", f"unset it, {ELSE}"
    file, nodes = address_file(), nodes_here()
    named = _content(file)
    if nodes and (len(nodes) == 1 or not named):
        if len(nodes) > 1:
            raise PlacementError(f"cluster.address=auto is one of {', '.join(nodes)}: name it with --address host:port")
        return nodes[0], f"{nodes[0]}, the head of the Ray node of this machine (cluster.address=auto)", ELSE
    if named:
        return named, f"{named}, which {file} names (cluster.address=auto)", f"if that cluster has ended, {ELSE}"
    raise PlacementError(f"cluster.address=auto, and no Ray runs on this machine, nor is there a {file}: {ELSE}")


def address_file() -> Path:
    """Where `ray start` leaves the address of its cluster."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(temporary, "ray", "ray_current_cluster")


def _content(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def nodes_here() -> list[str]:
    """Addresses of the clusters that have a node on this machine, own clusters of other commands too."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is somebody else's
            if process.name() == "raylet":
                words = [word for part in process.cmdline() for word in part.split()]
                found |= {word.split("=", 1)[1] for word in words if word.startswith("--gcs-address=")}
    return sorted(found)


def _refusal(host: str, port: int) -> Exception | None:
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        return error
    return None


def _own_address() -> str:
    """The address that Ray takes for this machine."""
    if os.environ.items() >= LOOPBACK.items():
        return "127.0.0.1"
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("8.8.8.8", 53))  # a datagram's: nothing is sent
        return str(route.getsockname()[0])
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


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
