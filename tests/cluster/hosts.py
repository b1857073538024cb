"""Several hosts on one machine: each has its own network, processes, name and memory; a private bridge joins them.

All namespaces are anonymous and live as long as their first process, and each of these reads a pipe that this process
holds. So when this process ends, however it ends, the pipes close, the first processes leave, and the kernel ends all
others in their namespaces and removes links, addresses and mounts. No file, interface or name is made outside.
"""

import json
import os
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

TOOLS = ("ip", "bridge", "unshare", "nsenter", "mount", "env", "cat")
SUBNET = "10.77.0"
"""Inside the namespaces only: no route leads out of them."""
GCS_PORT = 6379
BOOT_S = 60.0
COMMAND_S = 240.0

# What is local to a host is a tmpfs at the same path on each. It begins with a copy of what DeepSpeed compiled before,
# which takes minutes; a copy, because a process that is killed there leaves a lock for which all others wait for ever.
# SIGCHLD is ignored so that the kernel reaps orphans.
INIT = """
echo "$0" > /proc/sys/kernel/hostname
mount -t tmpfs -o size=512m tmpfs /dev/shm
mount -t tmpfs -o size=1g tmpfs /run
mkdir /run/tmp /run/ray
printf '%b' "$1" > /run/hosts
mount --bind /run/hosts /etc/hosts
for switch in /proc/sys/net/ipv6/conf/*/disable_ipv6; do [ ! -e "$switch" ] || echo 1 > "$switch"; done
if [ -d "$2" ]; then
    mkdir /run/.cache
    cp -a "$2" /run/.cache/
    find /run/.cache -name lock -delete
fi
ip link set lo up
echo up
exec env --ignore-signal=CHLD cat
"""


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: install iproute2 and util-linux"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True, timeout=20)
    return f"namespaces are refused: {probe.stderr.strip()}" if probe.returncode else None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _child(pid: int) -> int:
    """The one child of a process that forks once."""
    end = time.monotonic() + BOOT_S
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} started nothing within {BOOT_S} s")


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of a process's standard output; empty if it ended or took too long."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else b""


class Program:
    """A program on a host, with its output in a file outside."""

    def __init__(self, host: "Host", arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("wb") as output:
            self._enter = subprocess.Popen(
                [*host.enter, *arguments], env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def over(self) -> bool:
        return self._enter.poll() is not None

    def wait(self, seconds: float) -> int:
        """Its code.

        Raises:
            TimeoutError: it took longer; it is killed.
        """
        try:
            return self._enter.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self._enter.args!r} took more than {seconds} s:\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it; its helper outside follows."""
        if not self.over:
            os.kill(_child(self._enter.pid), signal.SIGKILL)
            self._enter.wait(COMMAND_S)


class Host:
    """A first process in namespaces of its own."""

    def __init__(self, name: str, hosts: str = "") -> None:
        self.name = name
        self._box = subprocess.Popen(
            ["unshare", "--net", "--pid", "--uts", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"]
            + ["sh", "-ec", INIT, name, hosts, str(Path.home() / ".cache" / "torch_extensions")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the tests, which take the hosts down
        )
        if _line(self._box, BOOT_S) != b"up\n":
            self.power_off()
            assert self._box.stderr is not None
            raise RuntimeError(f"host {name} did not come up: {self._box.stderr.read().decode()}")
        self.init = _child(self._box.pid)
        self.enter = ["nsenter", "-t", str(self.init), "--net", "--pid", "--uts", "--ipc", "--mount", "--wd=/"]

    @property
    def is_on(self) -> bool:
        return self._box.poll() is None

    def power_off(self) -> None:
        """All its processes end at once, by the kernel."""
        if self.is_on:
            self._box.kill()  # --kill-child: its first process goes with it
        self._box.wait(COMMAND_S)
        for pipe in (self._box.stdin, self._box.stdout):
            if pipe is not None:
                pipe.close()

    def net(self, *command: str) -> str:
        """Run a command of iproute2 in its network."""
        return _run("nsenter", "-t", str(self.init), "--net", *command)

    def processes(self) -> dict[int, str]:
        """Command lines by the process numbers that its own programs see."""
        if not self.is_on:
            return {}
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/pid") != namespace:
                    continue
                status = (path / "status").read_text()
                if "\nState:\tZ" in status:
                    continue
                inner = status.split("\nNSpid:", 1)[1].split("\n", 1)[0].split()[-1]
                found[int(inner)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (OSError, IndexError):
                continue  # it ended meanwhile
        return found


class Traffic:
    """IPv4 bytes that entered the bridge, by sender and receiver; counted by a process at the bridge."""

    def __init__(self, switch: Host, names: Mapping[str, str]) -> None:
        self._names = names
        self._counter = subprocess.Popen(
            [*switch.enter, sys.executable, "-c", COUNT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if _line(self._counter, BOOT_S) != b"counting\n":
            raise RuntimeError("the counter at the bridge did not start")

    def read(self) -> Counter[tuple[str, str]]:
        """Bytes so far, by (sender, receiver).

        Raises:
            RuntimeError: some were not counted.
        """
        assert self._counter.stdin is not None
        self._counter.stdin.write(b"\n")
        self._counter.stdin.flush()
        reply = json.loads(_line(self._counter, COMMAND_S))
        if reply["lost"]:
            raise RuntimeError(f"the counter lost {reply['lost']} packets")
        bytes_ = Counter[tuple[str, str]]()
        for pair, number in reply["bytes"].items():
            sender, receiver = (self._names.get(address, address) for address in pair.split(">"))
            bytes_[sender, receiver] += number
        return bytes_

    def close(self) -> None:
        if self._counter.stdin is not None:
            self._counter.stdin.close()
        self._counter.wait(COMMAND_S)


# A line on its input asks for the counts. A frame is counted when it comes in from a host's port, so also when the
# bridge then drops it; its copies on the bridge and on the way out are not.
COUNT = """
import collections, json, os, select, socket, struct
frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
frames.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
frames.setblocking(False)
counts, lost, head = collections.Counter(), 0, bytearray(34)
print("counting", flush=True)
while True:
    ready, _, _ = select.select([frames, 0], [], [])
    asked = 0 in ready and os.read(0, 1)
    if 0 in ready and not asked:
        break
    while True:
        try:
            size, (port, kind, direction, _, _) = frames.recvfrom_into(head, len(head), socket.MSG_TRUNC)
        except BlockingIOError:
            break
        if direction != socket.PACKET_OUTGOING and kind == 0x0800 and port.startswith("v-"):
            counts[socket.inet_ntoa(head[26:30]) + ">" + socket.inet_ntoa(head[30:34])] += size
    if asked:
        lost += struct.unpack("II", frames.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
        print(json.dumps(dict(bytes=counts, lost=lost)), flush=True)
"""


class Network:
    """Hosts at a bridge; a context manager.

    Args:
        names: of the hosts; the first one gets address 1.
        environment: of all their programs, besides the necessary.
    """

    def __init__(self, names: Sequence[str], environment: Mapping[str, str]) -> None:
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
        self.hosts: dict[str, Host] = {}
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath),  # another ninja would compile everything again
            "HOME": "/run",
            "TMPDIR": "/run/tmp",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **environment,
        }
        self._programs: list[Program] = []

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> None:
        self.switch = Host("switch")
        self.switch.net("ip", "link", "add", "br0", "type", "bridge")
        self.switch.net("ip", "link", "set", "br0", "up")
        known = "127.0.0.1 localhost\\n" + "".join(f"{ip} {name}\\n" for name, ip in self.addresses.items())
        for name, ip in self.addresses.items():
            host = self.hosts[name] = Host(name, known)
            peer = ["peer", "name", "eth0", "netns", str(host.init)]
            self.switch.net("ip", "link", "add", f"v-{name}", "type", "veth", *peer)
            self.switch.net("ip", "link", "set", f"v-{name}", "master", "br0", "up")
            host.net("ip", "addr", "add", f"{ip}/24", "dev", "eth0")
            host.net("ip", "link", "set", "eth0", "up")
        self.traffic = Traffic(self.switch, {ip: name for name, ip in self.addresses.items()})

    def close(self) -> None:
        """Everything ends."""
        for host in self.hosts.values():
            host.power_off()
        if hasattr(self, "traffic"):
            self.traffic.close()
        if hasattr(self, "switch"):
            self.switch.power_off()

    def plug(self, name: str, plugged: bool) -> None:
        """The host's cable at the bridge."""
        self.switch.net("ip", "link", "set", f"v-{name}", "up" if plugged else "down")

    def isolate(self, names: Sequence[str], isolated: bool) -> None:
        """Let these hosts reach only those that are not isolated."""
        for name in names:
            self.switch.net("bridge", "link", "set", "dev", f"v-{name}", "isolated", "on" if isolated else "off")

    def start(self, name: str, arguments: Sequence[str], log: Path, **variables: str) -> Program:
        """Start a program on a host."""
        return Program(self.hosts[name], arguments, log, {**self.environment, **variables})

    def start_ray(self, name: str, cpus: int, head: str, log: Path, gpus: int = 0, **variables: str) -> Program:
        """Start Ray on a host; on the head it is its head."""
        role = (
            ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
            if name == head
            else [f"--address={self.addresses[head]}:{GCS_PORT}"]
        )
        return self.start(
            name,
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start"),
                *role,
                f"--node-ip-address={self.addresses[name]}",
                f"--num-cpus={cpus}",
                f"--num-gpus={gpus}",
            ]
            + ["--object-store-memory=100000000", "--temp-dir=/run/ray", "--disable-usage-stats"],
            log,
            **variables,
        )

    def transport(self, path: Path) -> Path:
        """A program that runs a command on a host, as ssh does: an address, then a line for the shell there."""
        variables = {k: v for k, v in self.environment.items() if k != "RAY_AUTH_TOKEN"}
        values = " ".join(shlex.quote(f"{name}={value}") for name, value in variables.items())
        cases = "\n".join(
            f'{self.addresses[name]}) exec {shlex.join(host.enter)} env -i {values} bash -c "$*" ;;'
            for name, host in self.hosts.items()
        )
        path.write_text(f"#!/bin/bash\naddress=$1\nshift\ncase $address in\n{cases}\nesac\n")
        path.chmod(0o700)
        return path
