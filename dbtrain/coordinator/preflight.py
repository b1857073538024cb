"""Whether all nodes have what a run needs, by name, before anything trains."""

from collections.abc import Mapping
from typing import Any, Protocol

from dbtrain.coordinator import probe
from dbtrain.errors import PlacementError, VersionError

WAKE = "see in its logs whether it hangs or lacks a package, restart Ray there or take the node out, then try again"


class Nodes(Protocol):
    """What is needed of a cluster."""

    def on_every_node(self, function: Any, *arguments: Any) -> dict[str, Any]:
        """Call a function on each node at once; its value by the node's name, or the exception it raised."""
        ...

    def addresses(self) -> dict[str, tuple[str, int, float]]:
        """Address and port of each node, and how many GPUs Ray counts there."""
        ...


def check_packages(cluster: Nodes, source: str, arch: str = "") -> dict[str, Any]:
    """Facts of every node, all of which have this process's versions, and what data and network need.

    Args:
        cluster: the cluster whose nodes are asked.
        source: value of `data.source`.
        arch: value of `model.arch`.

    Raises:
        PlacementError: a node is there and does not answer.
        VersionError: names the node, the package and both versions, or what is not installed.
    """
    facts = cluster.on_every_node(probe.facts)
    silent = silences(facts)
    if silent:
        raise PlacementError(f"{'; '.join(silent)}: {WAKE}")
    needed = {*probe.PRESENT, *probe.SOURCES_NEED.get(source, ()), *probe.ARCHITECTURES_NEED.get(arch, ())}
    wrong = version_differences(probe.versions(), facts)
    if wrong:
        raise VersionError(f"{'; '.join(wrong)}: install the same versions everywhere (dbtrain itself is sent along)")
    lacking = [f"{node} lacks {', '.join(names)}" for node, names in absent(facts).items() if needed & set(names)]
    if lacking:
        raise VersionError(f"{'; '.join(lacking)}: install it there, any version, beside Ray, PyTorch and DeepSpeed")
    return facts


def absent(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each node that answered has not installed."""
    return {node: fact["absent"] for node, fact in answers(facts).items() if fact["absent"]}


def version_differences(here: Mapping[str, str], facts: Mapping[str, Any]) -> list[str]:
    """One line for each node that differs."""
    lines = []
    for node, fact in answers(facts).items():
        there = fact["versions"]
        parts = [f"{name} {there[name]}, not {here[name]}" for name in here if there[name] != here[name]]
        if parts:
            lines.append(f"{node} has {', '.join(parts)}")
    return lines


def silences(facts: Mapping[str, Any]) -> list[str]:
    """One line for each node that is there and did not answer."""
    return [
        f"{node} does not answer ({type(fact).__name__}: {' '.join(str(fact).split())[:300]})"
        for node, fact in facts.items()
        if isinstance(fact, Exception)
    ]


def answers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without the nodes that did not answer."""
    return {node: fact for node, fact in facts.items() if not isinstance(fact, Exception)}
