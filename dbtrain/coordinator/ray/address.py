"""Where a cluster is, found and tried before Ray is asked:
Ray ends the whole process where nothing answers."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from dbtrain.coordinator.placement import Node
from dbtrain.coordinator.ray.settings import LOOPBACK, prepare
from dbtrain.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from dbtrain.coordinator.ray.cluster import RayCluster


ANSWER_S = 0.5
"""Seconds until the first bytes of an answer; Ray's servers take less than a millisecond."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a connection by gRPC, and so by HTTP/2, begins  # RFC 9113, section 3.4: the preface, and SETTINGS."""
SETTINGS_AT, SETTINGS_TYPE = 3, 4
"""Where in the answer the type of its first frame stands, and what it must be  # RFC 9113, section 4.1"""
CONNECT_S = 5.0
"""Bounded: a host that drops packets would hold a connection attempt for minutes."""
SOCKET_BYTES = 107
"""Linux's limit of a socket's path."""
LONGEST_SOCKET = "/sockets/plasma_store"
CLIENT = "ray://"
"""Begins the address of a Ray Client server, which is not a node's own."""
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
ELSE = (
    "name a cluster with --address host:port, start one (ray start --head), or leave --address and cluster.address out "
    "for one of this command's own"
)


class Source(NamedTuple):
    """An address, and where it comes from."""

    address: str
    name: str
    """What messages call it: the variable, key or file that names it, with its value."""
    fix: str
    """What to do where nothing answers, as the end of a sentence."""


def check_address(address: str | None) -> bool:
    """Whether the cluster at an address, if one is given,
    is for this machine only, as that of launchers/local is.

    Raises:
        PlacementError: nothing answers there, or `auto` leads nowhere.
        ConfigError: it is no address, or Ray cannot put its files where this machine's temporary ones go.
    """
    if address is None:
        _check_temporary()
        return True
    source = _auto() if address == "auto" else Source(address, f"cluster.address={address}", ELSE)
    host, port = _host_and_port(source)
    on_loopback = host in THIS_MACHINE and not source.address.startswith(CLIENT)
    # Ray takes this machine's other address for 127.0.0.1,
    # unless the cluster is told to be this machine's only
    if on_loopback and _refusal(_own_address(), port) is None:
        return False
    _check_answers(source, host, port)
    return on_loopback


def _host_and_port(source: Source) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port; ConfigError if the address has not both."""
    host, colon, port = source.address.removeprefix(CLIENT).rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(f"{source.name} is no address: write auto, host:port or ray://host:port")
    return host.strip("[]"), int(port)


def _check_answers(source: Source, host: str, port: int) -> None:
    """Raise PlacementError if nothing listens there, or what does is no server of Ray's."""
    refusal = _refusal(host, port)
    if refusal is not None:
        raise PlacementError(
            f"nothing answers at {source.name} ({refusal}): is Ray started there, on this port (6379; 10001 for "
            f"ray://), and may this machine reach it? {source.fix[0].upper()}{source.fix[1:]}"
        )
    if _is_something_else(host, port):
        raise PlacementError(
            f"what answers at {source.name} is not Ray: give the port of its head (6379; 10001 for ray://), not that "
            f"of its dashboard (8265) or of another program; or {source.fix}"
        )


def _check_temporary() -> None:
    """Make sure that a Ray of this command's own can have its sockets; they lie where `ray start` has them.

    Raises:
        ConfigError: the folder's name is too long, or there is no such folder and none can be made.
    """
    variable, folder = _temporary()
    name = f"{variable}={folder}" if variable else folder
    _check_socket_length(name, folder)
    problem = _unwritable(folder)
    if problem:
        raise ConfigError(
            f"{name} cannot hold the files that Ray makes there ({problem}): set RAY_TMPDIR to a folder that can, such "
            "as RAY_TMPDIR=/tmp"
        )


def _check_socket_length(name: str, folder: str) -> None:
    # as Ray 2.60 names it: the time to a microsecond, and the process
    session = f"session_{'0' * len('2026-01-01_00-00-00_000000')}_{os.getpid()}"
    taken = len(os.fsencode(f"/ray/{session}{LONGEST_SOCKET}"))
    length = len(os.fsencode(folder))
    if length + taken > SOCKET_BYTES:
        raise ConfigError(
            f"{name} is too long a path for Ray ({length} bytes, at most {SOCKET_BYTES - taken}): the sockets that it "
            f"makes below may have {SOCKET_BYTES} bytes in all: set RAY_TMPDIR to a shorter one, such as "
            "RAY_TMPDIR=/tmp"
        )


def _unwritable(folder: str) -> str | None:
    """Why nothing can be put into a folder, which is made if it is missing; None if something can."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None if os.access(folder, os.W_OK | os.X_OK) else "it may not be written"


def _temporary() -> tuple[str | None, str]:
    """The variable that says where Ray puts its files, if one does, and that folder."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    return variable, os.environ[variable] if variable else "/tmp"


def _auto() -> Source:
    """What Ray takes for `auto`: RAY_ADDRESS, else this machine's one Ray node, else what `ray start` noted.

    Raises:
        PlacementError: there is nothing to take, or several nodes and no word which.
    """
    given = os.environ.get("RAY_ADDRESS")
    if given and given != "auto":
        return Source(given, f"RAY_ADDRESS={given} (cluster.address=auto)", f"unset it, {ELSE}")
    file, nodes = address_file(), nodes_here()
    noted = _content(file)
    if len(nodes) > 1 and not noted:
        raise PlacementError(f"cluster.address=auto is one of {', '.join(nodes)}: name it with --address host:port")
    if len(nodes) == 1:
        name = f"{nodes[0]}, the head of the Ray node of this machine (cluster.address=auto)"
        return Source(nodes[0], name, ELSE)
    if noted:
        name = f"{noted}, which {file} names (cluster.address=auto)"
        return Source(noted, name, f"if that cluster has ended, {ELSE}")
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
    addresses = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is somebody else's
            if process.name() == "raylet":
                words = [word for part in process.cmdline() for word in part.split()]
                addresses |= {word.split("=", 1)[1] for word in words if word.startswith("--gcs-address=")}
    return sorted(addresses)


def _refusal(host: str, port: int) -> Exception | None:
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        return error
    return None


def _is_something_else(host: str, port: int) -> bool:
    """Whether what listens there answers otherwise than a server by gRPC does, or hangs up. One that keeps
    silent, or wants TLS first, is left to Ray."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "", "false"):
        return False
    try:
        with socket.create_connection((host, port), CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            connection.sendall(HELLO)
            answer = connection.recv(len(HELLO))
    except TimeoutError:
        return False
    except OSError:
        return True
    return len(answer) <= SETTINGS_AT or answer[SETTINGS_AT] != SETTINGS_TYPE


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


def connect(address: str | None, modules: Sequence[Path] = ()) -> "RayCluster":
    """Connect to the cluster at `address`, or start one of this machine's own.

    Args:
        address: address of the cluster, or None.
        modules: files and packages of the user's that its workers import.

    Raises:
        PlacementError: there is none.
        ConfigError: the address is none.
        VersionError: the cluster has another version of Ray or Python.
    """
    prepare(address, check_address(address))
    from dbtrain.coordinator.ray.cluster import RayCluster

    return RayCluster(address, modules)


def this_machine() -> Node:
    """What a cluster of this machine's own would have, without starting one."""
    gpus = float(torch.cuda.device_count())
    return Node("this machine", {"CPU": float(os.cpu_count() or 1), **({"GPU": gpus} if gpus else {})})
