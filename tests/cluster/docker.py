"""A Docker daemon of the tests' own: its data in one folder, and no bridge, firewall rule or forwarding on the host.

Images cannot be pulled everywhere, so the base is made from Debian's packages; it stands in for python:3.11-slim.
Run as a program, this builds the image into a folder: ``python -m tests.cluster.docker FOLDER``; the tests take it from
there if DBTRAIN_DOCKER names the folder, and build it themselves otherwise.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT

TOOLS = {
    "/usr/sbin/dockerd": "docker.io",
    "/usr/bin/docker-compose": "docker-compose",
    "/usr/bin/mmdebstrap": "mmdebstrap",
}
PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
"""Debian's own client: others may lack BuildKit."""
BASE = "python:3.11-slim"
IMAGE = "dbtrain"
PACKAGES = "ca-certificates,python3,python3-venv,python3-dev,g++,tini"
CERTIFICATES = "/usr/local/share/ca-certificates"
HOOKS = [
    # a machine behind a proxy of its own has certificates that pip needs
    f'mkdir -p "$1"{CERTIFICATES}; cp {CERTIFICATES}/*.crt "$1"{CERTIFICATES}/ 2>/dev/null || true',
    'chroot "$1" update-ca-certificates >/dev/null 2>&1',
]
ISOLATED = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]


def missing() -> str | None:
    """Why there can be no daemon here, or None."""
    if os.geteuid() != 0:
        return "a Docker daemon needs root"
    absent = [package for path, package in TOOLS.items() if not Path(path).exists()]
    return f"{', '.join(absent)} not found: install Debian's packages of these names" if absent else None


class Docker:
    """A context manager; its folder is removed at the end unless it was given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.keep = folder is not None
        # short, because sockets lie in it
        self.folder = folder or Path(tempfile.mkdtemp(prefix="dkr", dir="/tmp"))
        self.folder.mkdir(exist_ok=True)
        self.environment = {**os.environ, "PATH": PATH, "DOCKER_HOST": f"unix://{self.folder}/socket"}
        self.environment |= {"DOCKER_BUILDKIT": "1", "COMPOSE_PROJECT_NAME": "dbtrain"}
        self.environment.pop("DOCKER_CONTEXT", None)

    def __enter__(self) -> "Docker":
        self._lock = (self.folder / "lock").open("w")  # one daemon for one folder: the other waits
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        places = [f"--{name}={self.folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
        with (self.folder / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                ["dockerd", *places, "-H", self.environment["DOCKER_HOST"], *ISOLATED],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 120
        while subprocess.run(["docker", "info"], env=self.environment, capture_output=True).returncode:
            if self._daemon.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"dockerd did not start:\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.terminate()
        try:
            self._daemon.wait(120)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait(120)
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in sorted((m for m in mounted if m.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", place], check=False)
        self._lock.close()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, seconds: float = 300, variables: Mapping[str, str] | None = None) -> str:
        """Output of a command, which must succeed."""
        done = subprocess.run(
            command, env={**self.environment, **(variables or {})}, cwd=ROOT, text=True, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
        return done.stdout

    def has(self, image: str) -> bool:
        """Whether the image is there."""
        command = ["docker", "image", "inspect", image]
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def build(self) -> None:
        """The image of docker/Dockerfile, and its base if there is none."""
        if not self.has(BASE):
            self._make_base()
        arguments = (
            ["--build-arg", "WHEELS_IMAGE=wheels", "--build-arg", "TORCH_INDEX="] if self._import_wheels() else []
        )
        self.call(
            "docker", "build", "--network=host", *arguments, "-f", "docker/Dockerfile", "-t", IMAGE, ".", seconds=900
        )

    def _make_base(self) -> None:
        release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
        excluded = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale")]
        options = ["--quiet", "--variant=minbase", f"--include={PACKAGES}", *excluded]
        hooks = [f"--customize-hook={hook}" for hook in HOOKS]
        tar = self.folder / "base.tar"
        self.call(
            "mmdebstrap", *options, *hooks, release["VERSION_CODENAME"], str(tar),
            "/etc/apt/sources.list.d/debian.sources", seconds=600,
        )  # fmt: skip
        settings = "ENV LANG=C.UTF-8 PIP_CERT=/etc/ssl/certs/ca-certificates.crt"
        self.call("docker", "import", "--change", settings, str(tar), BASE)
        tar.unlink()

    def _import_wheels(self) -> bool:
        """Give the build the folder of wheels that pip is set up with here, if it has PyTorch's CPU build."""
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], text=True, capture_output=True, env=dict(os.environ)
        )
        folders = [line.split("=", 1)[1].strip("'\"") for line in pip.stdout.splitlines() if "find-links" in line]
        folder = next((f for f in folders if list(Path(f).glob("torch-*+cpu-cp311-*.whl"))), None)
        if folder and not self.has("wheels"):
            tar = self.folder / "wheels.tar"
            self.call("tar", "-C", folder, "-cf", str(tar), ".")
            self.call("docker", "import", str(tar), "wheels")
            tar.unlink()
        return folder is not None

    def compose(self, *arguments: str, seconds: float = 300, **variables: str) -> str:
        """docker-compose with docker/compose.yaml."""
        return self.call(
            "docker-compose", "-f", "docker/compose.yaml", *arguments, seconds=seconds, variables=variables
        )

    def inspect(self, container: str) -> dict[str, object]:
        """What Docker knows of a container."""
        return dict(json.loads(self.call("docker", "inspect", container))[0])

    def volume(self, name: str) -> Path:
        """Where a volume of the composed services lies."""
        return self.folder / "data-root" / "volumes" / f"dbtrain_{name}" / "_data"


def main(arguments: Sequence[str]) -> None:
    """Build into a folder, and say how long it took."""
    start = time.monotonic()
    with Docker(Path(arguments[0])) as docker:
        docker.build()
        size = json.loads(docker.call("docker", "image", "inspect", IMAGE))[0]["Size"]
    print(f"image of {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
