"""What one machine says of itself. Runs on every node of a cluster,
so it needs nothing but the standard library.

Functions return plain values: they cross the network, and a node may lack what is asked for.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

DECISIVE = ("ray", "torch", "deepspeed", "safetensors", "pydantic", "fsspec")
"""Packages whose versions must be equal on all machines of a run, besides Python's."""

PRESENT = ("numpy", "omegaconf")
"""Packages that a worker imports too, of any version."""
SOURCES_NEED = {
    "digits": ("scikit-learn",),
    "images": ("pillow",),
    "hf": ("datasets", "pillow"),
    "hf_text": ("datasets",),
}
"""Packages that a source of data needs on every machine that trains, by the source's name."""
ARCHITECTURES_NEED = {
    "hf_vit": ("transformers",),
    "hf_llama": ("transformers",),
    "hf_dit": ("diffusers",),
    "hf_wan": ("diffusers",),
}
"""The same of an architecture, by its name."""

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
ANSWER_S = 20.0


def versions() -> dict[str, str]:
    """Versions of Python and the decisive packages; ``missing`` for one that is not installed.

    Python's patch level and what follows a plus are left out: a head with CPU wheels goes with GPU workers.
    """
    return {"python": ".".join(platform.python_version_tuple()[:2]), **{name: _version(name) for name in DECISIVE}}


def _version(name: str) -> str:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def facts() -> dict[str, Any]:
    """Versions, processor, memory, GPUs, compiler and shared memory of this machine; sizes in bytes."""
    optional = sum((*SOURCES_NEED.values(), *ARCHITECTURES_NEED.values()), PRESENT)
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    temporary = shutil.disk_usage(tempfile.gettempdir())
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "absent": [name for name in dict.fromkeys(optional) if _version(name) == "missing"],
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus(),
        "compiler": shutil.which("g++") or shutil.which("c++"),
        "shared_memory": shared.free if shared else 0,
        "temporary": {"path": tempfile.gettempdir(), "free": temporary.free},
        "prefix": sys.prefix,
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and driver of each NVIDIA GPU,
    as the driver's own tool says; none without the tool."""
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    return [{"name": n, "memory": int(m) * 2**20, "driver": d} for n, m, d in rows if m.isdigit()]


def clock() -> float:
    """Seconds since the epoch by this machine's clock."""
    return time.time()


def write_mark(url: str, name: str, content: str) -> str | None:
    """Write a file into the storage; what went wrong, or None."""
    from dbtrain.errors import ShardError
    from dbtrain.shards.storage.store import Store

    try:
        store = Store(url)
        store.makedirs()
        store.write(name, content.encode())
    except ShardError as error:
        return str(error)
    return None


def read_mark(url: str, name: str) -> dict[str, str]:
    """The content of a file of the storage, or the error."""
    from dbtrain.errors import ShardError
    from dbtrain.shards.storage.store import Store

    try:
        return {"content": Store(url).read(name).decode(errors="replace")}
    except ShardError as error:
        return {"error": str(error)}


def echo_mark(url: str, name: str) -> dict[str, str]:
    """Read a file and write it again under this machine's own name; that name, or the error."""
    read = read_mark(url, name)
    if "error" in read:
        return read
    own = f"{name}-{socket.gethostname()}-{os.getpid()}"
    problem = write_mark(url, own, read["content"])
    return {"error": problem} if problem else {"name": own}


def remove_marks(url: str, mark: str) -> None:
    """Remove all files with a mark in their names, the store's own lock files among them."""
    from dbtrain.shards.storage.store import Store

    store = Store(url)
    for name in store.list(temporaries=True):
        if mark in name:
            store.remove(name)


def reach_all(addresses: Mapping[str, tuple[str, int]], seconds: float) -> dict[str, str]:
    """Connect to each; what went wrong, by name, of those that failed."""
    failed = {}
    for name, (address, port) in addresses.items():
        try:
            socket.create_connection((address, port), seconds).close()
        except OSError as error:
            failed[name] = str(error)
    return failed
