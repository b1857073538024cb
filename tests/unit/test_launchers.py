"""What the launchers start and end, and who may read the token; with a `ray` that starts nothing but sleepers.

Real clusters are started and ended in tests/cluster/test_launchers.py and test_ssh.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

LOCAL, SSH = ROOT / "launchers" / "local" / "cluster.sh", ROOT / "launchers" / "ssh" / "cluster.sh"
TOOLS = {
    # as Ray does: the token is written by the umask, daemons lose their parent, and workers overwrite their environment
    "ray": """#!/bin/bash
case $1 in
    get-auth-token) mkdir -p ~/.ray; [ -s ~/.ray/auth_token ] || printf secret >~/.ray/auth_token ;;
    start)
        echo "$*" >>FOLDER/starts
        before=$(cat FOLDER/pids 2>/dev/null | wc -l)
        setsid bash -c 'env -i sleep 300 & echo $$ $! >>FOLDER/pids; wait' </dev/null >/dev/null 2>&1 &
        until [ "$(cat FOLDER/pids 2>/dev/null | wc -l)" -gt "$before" ]; do sleep 0.05; done
        [ -z "$BROKEN" ] ;;
esac
""",
    "python": f"""#!/bin/bash
exec {sys.executable} "$@"
""",
    # ssh HOST LINE, on hosts that are folders
    "transport": """#!/bin/bash
mkdir -p "FOLDER/$1"
HOME="FOLDER/$1" exec sh -c "$2"
""",
}
BOTH = pytest.mark.parametrize("launcher", [f"source {LOCAL} WHAT", f"{SSH} WHAT localhost"], ids=["local", "ssh"])

Run = Callable[..., subprocess.CompletedProcess[str]]


def started(folder: Path) -> list[list[int]]:
    """A daemon and its worker, for each start."""
    path = folder / "pids"
    return [[int(pid) for pid in line.split()] for line in path.read_text().splitlines()] if path.exists() else []


def lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Run]:
    """Run a line of bash with these tools, a home of its own, and an umask that hides nothing."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, content in TOOLS.items():
        (tools / name).write_text(content.replace("FOLDER", str(tmp_path)))
        (tools / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DBTRAIN_"))}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment |= {"DBTRAIN_SSH": str(tools / "transport")}

    def run(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", f"umask 022; {line}"]
        return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=60)

    yield run
    for pid in sum(started(tmp_path), []):
        with suppress(psutil.Error):
            psutil.Process(pid).kill()


@BOTH
def test_down_ends_what_up_started_on_this_port_and_nothing_else(shell: Run, tmp_path: Path, launcher: str) -> None:
    up, down = launcher.replace("WHAT", "up"), launcher.replace("WHAT", "down")
    current = tmp_path / "ray" / "ray_current_cluster"
    current.parent.mkdir()
    current.write_text("127.0.0.1:7002")
    for port in ("7001", "7002"):
        assert shell(up, DBTRAIN_PORT=port).returncode == 0
    first, second = started(tmp_path)
    assert all(map(lives, [*first, *second]))
    ended = shell(down, DBTRAIN_PORT="7001")
    assert (ended.returncode, ended.stderr) == (0, "") and "127.0.0.1:7001: 2 processes ended" in ended.stdout
    assert not any(map(lives, first)) and all(map(lives, second)) and current.exists()
    again = shell(down, DBTRAIN_PORT="7001")
    assert again.returncode == 0 and "nothing that `up` started runs" in again.stdout
    assert all(map(lives, second))
    assert shell(down, DBTRAIN_PORT="7002").returncode == 0
    assert not any(map(lives, second)) and not current.exists()  # from which `--address auto` is taken


@BOTH
def test_down_ends_what_a_broken_up_left(shell: Run, tmp_path: Path, launcher: str) -> None:
    assert shell(launcher.replace("WHAT", "up"), BROKEN="1").returncode != 0
    [left] = started(tmp_path)
    assert all(map(lives, left))
    assert shell(launcher.replace("WHAT", "down")).returncode == 0
    assert not any(map(lives, left))


def test_down_reaches_all_hosts_and_says_which_it_did_not(shell: Run, tmp_path: Path) -> None:
    hosts = "localhost 127.0.0.2 127.0.0.3"
    assert shell(f"{SSH} up {hosts}").returncode == 0
    starts = (tmp_path / "starts").read_text().splitlines()
    assert "--head" in starts[0] and all("--address 127.0.0.1:6379" in line for line in starts[1:])
    transport = tmp_path / "bin" / "transport"
    transport.write_text(transport.read_text().replace("\n", "\n[ $1 != 127.0.0.2 ] || exit 255\n", 1))
    ended = shell(f"{SSH} down {hosts}")
    assert ended.returncode == 1 and "127.0.0.2: failed" in ended.stderr
    assert "127.0.0.3: 127.0.0.1:6379: " in ended.stdout
    assert not any(map(lives, sum(started(tmp_path), [])))


def test_a_head_that_has_no_address_is_told(shell: Run) -> None:
    done = shell(f"{SSH} up no-such-host.invalid")
    assert done.returncode == 1 and "no-such-host.invalid: no address is known of it" in done.stderr


@pytest.mark.parametrize("before", [None, "old"])
@BOTH
def test_the_token_is_for_its_owner_alone(shell: Run, tmp_path: Path, launcher: str, before: str | None) -> None:
    """One that Ray, or the user, wrote for everybody too; and the shell that sources the launcher keeps its umask."""
    paths = [tmp_path / ".ray" / "auth_token", tmp_path / "localhost" / ".ray" / "auth_token"]
    if before:
        for path in paths:
            path.parent.mkdir(parents=True)
            path.write_text(before)
            path.chmod(0o644)
    done = shell(f"{launcher.replace('WHAT', 'up')}; umask")
    assert done.stdout.splitlines()[-1] == "0022"
    kept = paths if "ssh" in launcher else paths[:1]
    assert [path.stat().st_mode & 0o777 for path in kept] == [0o600] * len(kept)
    assert len({path.read_text() for path in kept}) == 1
    assert not before or kept[0].read_text() == before


def test_a_home_that_desk_and_host_share_keeps_its_token(shell: Run, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    (tmp_path / "localhost").symlink_to(tmp_path)
    assert shell(f"{SSH} up localhost").returncode == 0
    assert (tmp_path / ".ray" / "auth_token").read_text() == "secret"
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["auth_token"]
