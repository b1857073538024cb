"""The same processes on hosts with networks of their own, between which `tc` limits the rate."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.parallel.launch import ROOT, Process, Start
from tests.cluster.hosts import Network, Program, missing

BURST_S = 0.002
"""Of a token bucket, at its rate; and at least what one segmented packet of the kernel has."""
PACKET = 1 << 16
NAMES = ("ada", "bob", "cyd", "dan", "eve", "fay", "guy", "hal")


class OnHost:
    """A program on a host, as `launch.Process` has it.

    Args:
        program: that was started.
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    def poll(self) -> int | None:
        """Its code, None while it runs."""
        return self.program.wait(1) if self.program.over else None

    def kill(self) -> None:
        """End it."""
        self.program.kill()


@contextmanager
def hosts(count: int, rate: float | None) -> Iterator[tuple[Start, str, Network]]:
    """How to start a rank on its host, the address of the first, and the network.

    Args:
        count: of the hosts.
        rate: bits a second that each host may send; None for as many as the machine can.

    Raises:
        SystemExit: the machine has no network namespaces, or its kernel no `tbf`.
    """
    why = missing()
    if why:
        raise SystemExit(f"--links needs hosts in network namespaces: {why}")
    names = NAMES[:count]
    # the kernel's own segments are as large as 64 KiB, and gloo shall use the one interface there is
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "", "HOME": "/run", "TMPDIR": "/run/tmp"}
    with Network(names, environment) as network:
        for name in names if rate else ():
            limit(network, name, rate)

        def start(rank: int, command: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
            line = ["env", "-C", str(ROOT), *command]
            return OnHost(network.start(names[rank], line, log, **variables))

        yield start, network.addresses[names[0]], network


def limit(network: Network, name: str, rate: float | None) -> None:
    """Let a host send at most so many bits a second."""
    assert rate
    burst = max(4 * PACKET, int(rate * BURST_S / 8))
    bucket = ["tbf", "rate", f"{int(rate)}bit", "burst", str(burst), "latency", "50ms"]
    network.hosts[name].net("tc", "qdisc", "replace", "dev", "eth0", "root", *bucket)


def bits(text: str) -> float | None:
    """`none`, or a rate such as 10g, 1g, 100m, in bits a second.

    Raises:
        SystemExit: it is neither.
    """
    if text == "none":
        return None
    scale = {"g": 1e9, "m": 1e6, "k": 1e3}.get(text[-1:])
    try:
        return float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise SystemExit(f"--links {text}: a rate is none, or bits a second such as 10g or 100m") from None
