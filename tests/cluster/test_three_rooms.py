"""docs/places.md, run as it stands: three rooms without a route between them, a block each, carried by file."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbtrain.coordinator.ray.settings import SETTINGS
from tests.cluster.hosts import Host, Program, missing
from tests.conftest import ROOT, Command, shards

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

PAGE = ROOT / "docs" / "places.md"
GUIDE = PAGE.read_text().split("## Three rooms, one model")[1].split("\n## ")[0]
SCRIPTS = re.findall(r"^```sh\n# room (\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
STEPS = 60
COMMAND_S = 900.0
STICK = "/run/stick"
HOME = "/run/home"
"""In each room; /run is a memory of the room's own."""


class Room:
    """A host with a loopback interface and nothing else, whose files no other room sees."""

    def __init__(self, name: str, folder: Path) -> None:
        self.host, self.folder, self.count = Host(name, "127.0.0.1 localhost\\n"), folder, 0
        # what rooms could share by accident: of the folders outside none but the program's own can be written or seen
        inside = ["nsenter", "-t", str(self.host.init), "--mount"]
        subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
        self.run(f"mkdir -p {HOME} {STICK} && cp -r {ROOT}/configs {HOME}")

    def run(self, script: str) -> str:
        """Run lines of a page in the room's shell."""
        program = self.start(script)
        assert program.wait(COMMAND_S) == 0, program.output()
        return program.output()

    def start(self, script: str) -> Program:
        """Begin to run lines of a page in the room's shell."""
        self.count += 1
        dbtrain = shlex.join([sys.executable, "-m", "dbtrain"])
        lines = f'set -e\ncd {HOME} 2>/dev/null || true\ndbtrain() {{ {dbtrain} "$@"; }}\n{script}'
        environment = {
            **SETTINGS,
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": "/run",
            "TMPDIR": "/run/tmp",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "STICK": STICK,
        }
        log = self.folder / f"{self.host.name}-{self.count}.log"
        return Program(self.host, ["bash", "-c", lines], log, environment)

    def bytes_sent(self) -> dict[str, int]:
        """By interface, what the room has sent so far."""
        lines = self.run("cat /proc/net/dev").splitlines()[2:]
        return {line.split(":")[0].strip(): int(line.split(":")[1].split()[8]) for line in lines}


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[dict[str, Room]]:
    reason = missing()
    if reason:
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    made: dict[str, Room] = {}
    try:
        for name in ("one", "two", "three"):
            made[name] = Room(name, tmp_path)
        yield made
    finally:
        for room in made.values():
            room.host.power_off()


class Stick:
    """What is carried: plugged into one room at a time, where alone it can be seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def _copy(self, room: Room, back: bool) -> None:
        inside = Path(f"/proc/{room.host.init}/root{STICK}")
        source, target = (inside, self.folder) if back else (self.folder, inside)
        for path in target.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(source, target, dirs_exist_ok=True)

    def run(self, room: Room, script: str) -> str:
        """Run a script in a room in which the stick is plugged meanwhile."""
        self._copy(room, back=False)
        said = room.run(script)
        self._copy(room, back=True)
        room.run(f"rm -rf {STICK}/*")
        return said


def test_the_page_has_every_step() -> None:
    assert [room for room, _ in SCRIPTS] == ["one", "two", "three"] * 2 + ["two", "three", "one"]


def test_three_rooms_train_one_model(rooms: dict[str, Room], tmp_path: Path) -> None:
    for room in rooms.values():
        assert room.run("ip -o link | cut -d: -f2").split() == ["lo"]
        assert "unreachable" in room.run("ip route get 10.77.0.1 2>&1 || true")
        assert room.run("ip route show table all type unicast | grep -v ' lo ' || true") == ""
    stick = Stick(tmp_path / "stick")
    before, training, after = SCRIPTS[:3], SCRIPTS[3:6], SCRIPTS[6:]
    for name, script in before:
        stick.run(rooms[name], script)
    begun = [(name, rooms[name].start(script)) for name, script in training]
    for name, program in begun:
        assert program.wait(COMMAND_S) == 0, f"room {name}: {program.output()}"
    said = [stick.run(rooms[name], script) for name, script in after][-1]
    assert "all blocks are done; now: dbtrain merge runs/three" in said
    assert "merged 3 block(s)" in said and "mean over the chain" in said
    for number, name in enumerate(("one", "two", "three")):
        assert re.search(
            rf"block {number}: .*last commit at step {STEPS} by attempt 1 at {name}-[0-9a-f]{{6}}", said
        ), said
    assert {tuple(room.bytes_sent()) for room in rooms.values()} == {("lo",)}
    print({name: room.bytes_sent() for name, room in rooms.items()})

    gathered = Path(f"/proc/{rooms['one'].host.init}/root{HOME}/runs/three")
    alone = tmp_path / "alone" / "runs"
    alone.mkdir(parents=True)
    sealed = Path(f"/proc/{rooms['two'].host.init}/root{HOME}/runs/three")
    shutil.copytree(sealed, alone / "three", ignore=shutil.ignore_patterns("blocks", "LOCK*", ".*"))
    command = Command(tmp_path / "alone", ["train", "runs/three"])
    try:
        assert command.wait(COMMAND_S) == 0, command.output()
    finally:
        command.kill()
    expected = shards(alone / "three", STEPS)
    assert len(expected) == 9 and shards(gathered, STEPS) == expected
