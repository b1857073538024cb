"""One screen about this machine or a cluster: what is there, what would not work, and the fix."""

import os
import secrets
import socket
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dbtrain import __version__
from dbtrain.coordinator import probe
from dbtrain.coordinator.ray.address import connect
from dbtrain.doctor.checks import CLOCK_BAD_S, Finding, examine_cluster, machine_findings, package_findings
from dbtrain.errors import ConfigError, DbtrainError, PreflightError, ShardError
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.console import size
from dbtrain.telemetry.layout import say, show_table

RAY_PORTS = {6379: "a head", 8265: "its dashboard", 10001: "Ray Client"}
STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}
MEMORY_PER_BLOCK = 2**30
"""What Ray's helpers and a worker with PyTorch take together on a CPU, measured."""


def doctor(address: str | None, storage: str, nodes: int | None, gpus: int | None, console: Console) -> None:
    """Look, show, and refuse.

    Args:
        address: address of a cluster, or None for this machine.
        storage: directory or URL for runs.
        nodes, gpus: what a cluster is planned to have: nodes at least, and GPUs of each.
        console: console to show it on.

    Raises:
        ConfigError: nodes or GPUs are planned, but no cluster is named.
        PreflightError: something would not work.
        PlacementError: no cluster answers at the address.
    """
    planned = {"--nodes": nodes, "--gpus": gpus}
    given = [f"{option}={value}" for option, value in planned.items() if value is not None]
    if given and address is None:
        raise ConfigError(f"{' '.join(given)} is of a cluster, and none is named: add --address, or leave it out")
    findings = examine_machine(storage) if address is None else _at(address, storage, nodes, gpus)
    where = "this machine" if address is None else f"the cluster at {address}"
    show_table(console, table(findings, f"dbtrain {__version__} on {where}"))
    bad = [finding for finding in findings if finding.level == "bad"]
    if bad:
        problems = "; ".join(f"{finding.what}: {finding.detail} ({finding.fix})" for finding in bad)
        raise PreflightError(f"{len(bad)} thing(s) would not work: {problems}")
    say(console, "a run would work here", "green")


def _at(address: str, storage: str, nodes: int | None, gpus: int | None) -> list[Finding]:
    cluster = connect(address)
    try:
        return examine_cluster(cluster, storage, nodes, gpus)
    finally:
        cluster.close()


def table(findings: Sequence[Finding], title: str) -> Table:
    """All findings, with what fixes those that need it."""
    shown = Table("", "", "found", "fix", title=title, title_justify="left")
    for finding in findings:
        mark = f"[{STYLES[finding.level]}]{finding.level}[/]"
        fix = "" if finding.level == "ok" else finding.fix
        shown.add_row(finding.what, mark, _plain(finding.detail), _plain(fix))
    return shown


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def examine_machine(storage: str) -> list[Finding]:
    """Every finding about this machine."""
    fact = probe.facts()
    missing = [name for name, version in fact["versions"].items() if version == "missing"]
    versions = ", ".join(f"{name} {version}" for name, version in fact["versions"].items())
    return [
        Finding("versions", "bad", f"{', '.join(missing)} missing", f"pip install {' '.join(missing)}")
        if missing
        else Finding("versions", "ok", versions),
        *package_findings(fact["absent"]),
        _processor(fact["cpus"], fact["memory"]),
        _gpus(fact["gpus"]),
        *machine_findings(fact),
        _ports(),
        *_storage(storage),
    ]


def _processor(cpus: int, memory: int) -> Finding:
    node = f"{cpus} CPUs, {size(memory)} memory"
    if memory < 2 * MEMORY_PER_BLOCK:
        return Finding("machine", "warn", node, "each block takes about 1 GiB beside its model; run few at a time")
    return Finding("machine", "ok", node)


def _gpus(seen: Sequence[dict[str, object]]) -> Finding:
    import torch

    usable = torch.cuda.device_count()
    if len(seen) > usable and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        built = f"torch {torch.__version__} can use {usable}"
        return Finding("GPUs", "bad", f"{len(seen)} GPU(s), {built}", "install the CUDA build of torch, or its driver")
    if not usable:
        return Finding("GPUs", "ok", "none: blocks train on CPUs")
    parts = [torch.cuda.get_device_properties(index) for index in range(usable)]
    return Finding("GPUs", "ok", ", ".join(f"{part.name} ({size(part.total_memory)})" for part in parts))


def _ports() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        return Finding("ports", "bad", f"cannot listen on 127.0.0.1: {error}", "bring the loopback device up")
    taken = [f"{port} ({use})" for port, use in RAY_PORTS.items() if _answers(port)]
    if taken:
        in_use = f"in use: {', '.join(taken)}"
        return Finding("ports", "ok", f"{in_use}; a cluster runs here? then --address auto, else ray start --port=...")
    return Finding("ports", "ok", "loopback works; those of a Ray head are free")


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


def _storage(url: str) -> list[Finding]:
    """Do to the storage what a run does to it."""
    fix = "choose another place with --storage (and out=), or fix its permissions"
    name, content = f".preflight-{secrets.token_hex(6)}", secrets.token_hex(16).encode()
    try:
        store = Store(url)
        unmounted = _unmounted(store)
        store.makedirs()
        findings = [*unmounted, _commits(store, name, content, fix), _its_clock(store, name)]
    except DbtrainError as error:
        return [Finding("storage", "bad", str(error), fix)]
    finally:
        _tidy(url, name)
    return findings


def _unmounted(store: Store) -> list[Finding]:
    """A typing error, or a file system that is not mounted, would otherwise pass as a new folder."""
    if not store.is_local or store.path.parent.exists():
        return []
    was_made = f"{store.path.parent} did not exist and was made to try it"
    return [Finding("storage", "warn", was_made, "is the path right, and its file system mounted on every node?")]


def _commits(store: Store, name: str, content: bytes, fix: str) -> Finding:
    store.write(name, b"old" + content)
    store.write(name, content)
    if store.read(name) != content or store.create(name, b"") or not store.swap(name, content, content[::-1]):
        return Finding("storage", "bad", f"{store.url} does not replace files in one step", fix)
    if store.is_local:
        store.child(f"{name}-folder").write("part", content)
        store.move(f"{name}-folder", f"{name}-moved")
        if store.read(f"{name}-moved/part") != content:
            return Finding("storage", "bad", f"{store.url} does not rename directories in one step", fix)
    return Finding("storage", "ok", f"{store.url}: writable; replaces and renames in one step")


def _its_clock(store: Store, name: str) -> Finding:
    if not store.is_local:
        return Finding("clocks", "ok", "not compared: an object store tells none")
    before = time.time()
    store.write(name, b"now")
    written = (store.path / name).stat().st_mtime
    skew = max(before - written, written - time.time(), 0.0)
    if skew > CLOCK_BAD_S:
        return Finding("clocks", "bad", f"{store.url} is {skew:.0f} s away from here", "run chrony or ntpd on both")
    return Finding("clocks", "ok", "this machine's and the storage's agree")


def _tidy(url: str, name: str) -> None:
    try:
        probe.remove_marks(url, name)
    except ShardError:
        return
