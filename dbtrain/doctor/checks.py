"""Everything about a cluster or a machine that might not work, as a list of findings with their fixes."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dbtrain.coordinator import probe
from dbtrain.coordinator.preflight import WAKE, Nodes, absent, answers, silences, version_differences
from dbtrain.shards.storage.store import Store

CLOCK_WARN_S, CLOCK_BAD_S = 2.0, 10.0
"""A run's lock is believed dead 30 s after its last heartbeat;
clocks that differ by a third of it mislead."""
JOIN_S = 60.0
"""Nodes of a cluster that has just been started come one after the other."""
SHARED_MEMORY_MIN = 64 * 2**20
"""Docker's default. Blocks pass nothing through it, but Ray puts its object store there."""
TEMPORARY_MIN = 256 * 2**20
"""Ray's logs and sockets, and this package."""

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    level: Level
    detail: str
    fix: str = ""


def examine_cluster(cluster: Nodes, storage: str, nodes: int | None, gpus: int | None) -> list[Finding]:
    """Every finding about a cluster.

    Args:
        cluster: connected.
        storage: directory or URL for runs, which all nodes must share.
        nodes: how many there must be at least; they are waited for.
        gpus: how many each must have, if that is planned.
    """
    facts = _facts_of(cluster, nodes or 1)
    answered = answers(facts)
    return [
        _count(facts, nodes),
        *[Finding("answers", "bad", line, WAKE) for line in silences(facts)],
        *_versions(facts),
        *_packages(facts),
        *_gpus(cluster, answered, gpus),
        *_machines(answered),
        *_shared_storage(cluster, storage),
        *_clocks(cluster),
        *_reach(cluster),
    ]


def _facts_of(cluster: Nodes, planned: int) -> dict[str, Any]:
    """Facts of as many nodes as are planned, if they come in time; otherwise of those that are there."""
    until = time.monotonic() + JOIN_S
    while len(cluster.addresses()) < planned and time.monotonic() < until:
        time.sleep(0.5)
    return cluster.on_every_node(probe.facts)


def _count(facts: Mapping[str, Any], planned: int | None) -> Finding:
    listed = f"{len(facts)} node(s): {', '.join(facts)}"
    if planned is not None and len(facts) < planned:
        return Finding("nodes", "bad", f"{listed}; planned {planned}", "look at the logs of the nodes that are missing")
    return Finding("nodes", "ok", listed)


def _versions(facts: Mapping[str, Any]) -> list[Finding]:
    here = probe.versions()
    wrong = version_differences(here, facts)
    fix = "install the same versions everywhere; dbtrain itself is sent along"
    if wrong:
        return [Finding("versions", "bad", line, fix) for line in wrong]
    return [Finding("versions", "ok", "equal everywhere: " + ", ".join(f"{k} {v}" for k, v in here.items()))]


def _packages(facts: Mapping[str, Any]) -> list[Finding]:
    return [found for node, names in absent(facts).items() for found in package_findings(names, f"{node}: ")]


def package_findings(names: Sequence[str], prefix: str = "") -> list[Finding]:
    """About the packages that one machine lacks: those that every run needs, and those that some need."""
    needed = [name for name in names if name in probe.PRESENT]
    other = [name for name in names if name not in probe.PRESENT]
    findings = []
    if needed:
        fix = f"pip install {' '.join(needed)}"
        findings.append(Finding("packages", "bad", f"{prefix}{', '.join(needed)} missing", fix))
    if other:
        fix = f"only {_sources(other)} needs it: pip install {' '.join(other)}"
        findings.append(Finding("packages", "warn", f"{prefix}{', '.join(other)} missing", fix))
    return findings


def _sources(packages: Sequence[str]) -> str:
    kinds = (("data.source", probe.SOURCES_NEED), ("model.arch", probe.ARCHITECTURES_NEED))
    return " or ".join(f"{key}={name}" for key, of in kinds for name, needs in of.items() if set(needs) & set(packages))


def _gpus(cluster: Nodes, facts: Mapping[str, Any], planned: int | None) -> list[Finding]:
    counted = {node: gpus for node, (_, _, gpus) in cluster.addresses().items()}
    findings = []
    for node, fact in facts.items():
        seen, by_ray = len(fact["gpus"]), counted.get(node, 0)
        kinds = ", ".join(f"{gpu['name']} ({gpu['memory'] / 2**30:.0f} GiB)" for gpu in fact["gpus"]) or "none"
        detail = f"{node}: {kinds}; Ray gives out {by_ray:g}"
        if planned is not None and by_ray != planned:
            fix = "start Ray where the GPUs are visible, or change the plan"
            findings.append(Finding("GPUs", "bad", f"{detail}; planned {planned}", fix))
        elif by_ray > seen:
            findings.append(
                Finding("GPUs", "bad", detail, "nvidia-smi does not see them: driver, or too large --num-gpus")
            )
        else:
            findings.append(Finding("GPUs", "ok", detail))
    return findings


def _machines(facts: Mapping[str, Any]) -> list[Finding]:
    return [finding for node, fact in facts.items() for finding in machine_findings(fact, f"{node}: ")]


def machine_findings(fact: Mapping[str, Any], prefix: str = "") -> list[Finding]:
    """About the compiler, shared memory and the temporary folder of one machine."""
    shared, temporary = fact["shared_memory"], fact["temporary"]
    return [
        Finding("compiler", "ok", f"{prefix}{fact['compiler']}")
        if fact["compiler"]
        else Finding("compiler", "warn", f"{prefix}no g++: training.compile=true needs it", "install g++"),
        Finding("shared memory", "ok", f"{prefix}{shared / 2**30:.1f} GiB free in /dev/shm")
        if shared >= SHARED_MEMORY_MIN
        else Finding(
            "shared memory", "bad", f"{prefix}{shared / 2**20:.0f} MiB free in /dev/shm", "docker: --shm-size=1g"
        ),
        Finding("temporary files", "ok", f"{prefix}{temporary['free'] / 2**30:.1f} GiB free in {temporary['path']}")
        if temporary["free"] > TEMPORARY_MIN
        else Finding("temporary files", "bad", f"{prefix}{temporary['path']} has less than 256 MiB", "set TMPDIR"),
    ]


def _shared_storage(cluster: Nodes, storage: str) -> list[Finding]:
    """Written here, read everywhere; and written by every node, read here."""
    storage = Store(storage).url  # absolute: a node has another working directory
    mark, content = f".preflight-{secrets.token_hex(6)}", secrets.token_hex(16)
    fix = "give a shared file system's path or a URL with --storage (and out=) that every node may write"
    problem = probe.write_mark(storage, mark, content)
    if problem:
        return [Finding("storage", "bad", problem, fix)]
    read = cluster.on_every_node(probe.read_mark, storage, mark)
    written = cluster.on_every_node(probe.echo_mark, storage, mark)
    both = read.keys() & written.keys()  # a node may go between the two questions
    wrong = [
        line for node in sorted(both) if (line := _unshared(node, read[node], written[node], storage, mark, content))
    ]
    probe.remove_marks(storage, mark)
    if wrong:
        return [Finding("storage", "bad", line, fix) for line in wrong]
    return [Finding("storage", "ok", f"{storage}: what one node writes the others read; {len(both)} node(s)")]


def _unshared(node: str, read: Any, echoed: Any, storage: str, mark: str, content: str) -> str | None:
    for outcome in (read, echoed):
        if isinstance(outcome, Exception) or "error" in outcome:
            return f"{node}: {outcome if isinstance(outcome, Exception) else outcome['error']}"
    if read["content"] != content:
        return f"{node} reads something else in {storage}/{mark} than this machine wrote"
    back = probe.read_mark(storage, echoed["name"])
    return None if back.get("content") == content else f"{node} writes into a {storage} that this machine does not see"


def _clocks(cluster: Nodes) -> list[Finding]:
    before = time.time()
    clocks = cluster.on_every_node(probe.clock)
    after = time.time()
    findings = []
    for node, there in clocks.items():
        if isinstance(there, Exception):
            continue
        # it was read at some time between the two, so only what lies outside is a difference
        skew = max(before - there, there - after, 0.0)
        level: Level = "ok" if skew < CLOCK_WARN_S else "warn" if skew < CLOCK_BAD_S else "bad"
        if level != "ok":
            findings.append(
                Finding("clocks", level, f"{node} differs by {skew:.1f} s or more", "run chrony or ntpd there")
            )
    return findings or [Finding("clocks", "ok", f"equal within {after - before + CLOCK_WARN_S:.1f} s")]


def _reach(cluster: Nodes) -> list[Finding]:
    addresses = {node: (ip, port) for node, (ip, port, _) in cluster.addresses().items()}
    tried = cluster.on_every_node(probe.reach_all, addresses, 3.0)
    cut = [f"{node} to {other}: {why}" for node, result in tried.items() for other, why in _failed(result).items()]
    if cut:
        fix = "isolated blocks do without; open the ports between nodes for blocks with workers on several"
        return [Finding("ports", "warn", line, fix) for line in cut[:8]]
    return [Finding("ports", "ok", "every node reaches every other")]


def _failed(result: Any) -> dict[str, str]:
    return {"all": str(result)} if isinstance(result, Exception) else dict(result)
