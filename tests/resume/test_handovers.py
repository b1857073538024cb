"""Blocks that are trained in pieces of random length at random places, carried by file: the bits of one machine."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import load_config
from dbtrain.errors import ShardError
from dbtrain.run.gather import gather, missing
from dbtrain.run.pack import pack
from dbtrain.run.run import Run
from dbtrain.run.seal import seal
from dbtrain.shards.commit import Commit
from dbtrain.shards.packed_file import PackedFile
from dbtrain.shards.storage.local import LocalFiles
from dbtrain.shards.storage.store import Store
from tests.conftest import CONFIG, STEPS, TRAIN, Command, shards
from tests.unit.conftest import never
from tests.unit.run import carried

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(7200)]

BLOCKS = 3
PLACES = ("ada", "bob", "cyd")
ONCE = ["cluster.max_crashes=0", "cluster.max_preemptions=0", "cluster.cpus_per_worker=0.5"]
"""A worker that ends early ends the command: what it committed goes to another place."""
OVERRIDES = TRAIN[2:]
assert TRAIN[1] == CONFIG


class Stopped(BaseException):
    """What a signal would raise."""


@dataclass
class Journey:
    """A sealed run at several places, and what was carried between them.

    Args:
        folder: of everything.
        dice: decide what happens.
    """

    folder: Path
    dice: random.Random

    def __post_init__(self) -> None:
        config = load_config(CONFIG, [*OVERRIDES, f"out={self.folder}/sealed"])
        seal(config, never)
        for place in (*PLACES, "home"):
            shutil.copytree(self.folder / "sealed" / "run", self.folder / place / "run")
        other = load_config(CONFIG, [*OVERRIDES, f"out={self.folder}/foreign", "seed=1"])
        seal(other, never)
        foreign = Run.at(other.run_url)
        carried.commit(foreign, 0, 7)
        self.foreign = pack(foreign, f"{self.folder}/foreign.packed").url
        self.packed: list[list[str]] = [[] for _ in range(BLOCKS)]
        """Files of each block in the order in which they were made."""
        self.faults: list[str] = []
        self.deck: list[str] = []
        """Faults that are still to come in this round of all of them."""

    def at(self, place: str) -> Run:
        return Run.at(f"{self.folder}/{place}/run")

    def train(self, place: str, pieces: dict[int, int | None]) -> None:
        """Train blocks at a place, each to its end, or to a step at which its worker is warned or killed."""
        faults = [self.end_of(block, until) for block, until in pieces.items() if until]
        arguments = ["train", f"{self.folder}/{place}/run", "--blocks", ",".join(map(str, pieces)), *ONCE]
        command = Command(self.folder, arguments, faults)
        try:
            code = command.wait()
        finally:
            command.kill()
        assert code == (1 if faults else 0), command.output()

    def end_of(self, block: int, step: int) -> dict[str, Any]:
        kinds = ["term", "kill"] if step != STEPS - 1 else ["kill"]  # warned in its last step, it ends it and is done
        return {"block": block, "step": step, "kind": self.dice.choice(kinds)}

    def carry(self, place: str, block: int) -> None:
        """Take a block to a place; before that goes right, something goes wrong."""
        if not self.packed[block]:
            return
        source = self.packed[block][-1]
        before = self.newest(place, block)
        self.deck = self.deck or self.dice.sample(FAULTS, len(FAULTS))
        fault = self.deck.pop()
        FAULTS_BY_NAME[fault](self, place, block, source)
        after = self.newest(place, block)
        assert after == before or fault in ("stopped", "older"), fault
        self.faults.append(fault)
        gather(self.at(place), [source])
        assert self.newest(place, block) == pack_digest(source, block)

    def newest(self, place: str, block: int) -> bytes | None:
        commit = self.at(place).block(block).checkpoints.newest_commit()
        return None if commit is None else commit.digest()

    def hand_over(self, pieces: dict[int, int | None]) -> None:
        """Carry some blocks to one place and train a piece of each there, each to the step that ends its piece."""
        place = self.dice.choice(PLACES)
        for block in pieces:
            self.carry(place, block)
        self.train(place, pieces)
        for block in pieces:
            if self.newest(place, block) is not None:
                target = f"{self.folder}/block{block}-{len(self.packed[block])}.packed"
                self.packed[block].append(pack(self.at(place), target, [block]).url)


def commit_in(url: str, block: int) -> Commit:
    path = Path(url)
    return PackedFile(Store(path.parent), path.name).commits[block]


def pack_digest(url: str, block: int) -> bytes:
    return commit_in(url, block).digest()


def step_of(url: str, block: int) -> int:
    return commit_in(url, block).step


def refused(journey: Journey, place: str, sources: Sequence[str], words: str) -> None:
    with pytest.raises(ShardError) as caught:
        gather(journey.at(place), sources)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def cut_off(journey: Journey, place: str, block: int, source: str) -> None:
    data = Path(source).read_bytes()
    bad = journey.folder / "cut.packed"
    bad.write_bytes(data[: journey.dice.randrange(16, len(data))])
    refused(journey, place, [str(bad)], "was cut off; carry it again")


def flipped(journey: Journey, place: str, block: int, source: str) -> None:
    data = bytearray(Path(source).read_bytes())
    data[journey.dice.randrange(16, len(data))] ^= 1 << journey.dice.randrange(8)
    bad = journey.folder / "flipped.packed"
    bad.write_bytes(data)
    if pack_or_none(bad, block) == journey.newest(place, block):
        return  # it is here already, so nothing of the file's shards is read
    refused(journey, place, [str(bad)], "is damaged")


def pack_or_none(path: Path, block: int) -> bytes | None:
    try:
        return pack_digest(str(path), block)
    except ShardError:
        return b""


def foreign(journey: Journey, place: str, block: int, source: str) -> None:
    refused(journey, place, [journey.foreign], "codebook_hash is ")


def older(journey: Journey, place: str, block: int, source: str) -> None:
    """A file of before, once the newest is here."""
    gather(journey.at(place), [source])
    before = [file for file in journey.packed[block] if step_of(file, block) < step_of(source, block)]
    if before:
        refused(journey, place, [before[0]], "is older than")


def other(journey: Journey, place: str, block: int, source: str) -> None:
    """Somebody else trained the block to the same step, to other weights."""
    step = step_of(source, block)
    theirs = journey.folder / "theirs"
    shutil.rmtree(theirs, ignore_errors=True)
    shutil.copytree(journey.folder / "sealed" / "run", theirs / "run")
    carried.commit(Run.at(f"{theirs}/run"), block, step, place="theirs-00000f")
    refused(journey, place, [source, f"{theirs}/run"], "two places trained it, with other results")


def stopped(journey: Journey, place: str, block: int, source: str) -> None:
    """A signal at a random operation of the storage."""
    left = [journey.dice.randrange(30)]
    kinds = ("write", "write_stream", "create", "swap", "remove", "makedirs")
    real = {kind: getattr(LocalFiles, kind) for kind in kinds}

    def armed(kind: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
            return real[kind](*arguments)

        return call

    try:
        for kind in kinds:
            setattr(LocalFiles, kind, armed(kind))
        gather(journey.at(place), [source])
    except Stopped:
        pass
    finally:
        for kind in kinds:
            setattr(LocalFiles, kind, real[kind])
    Store(f"{journey.folder}/{place}/run").remove("LOCK.json")  # of this very process, which lives


FAULTS_BY_NAME: dict[str, Callable[[Journey, str, int, str], None]] = {
    "cut off": cut_off,
    "flipped": flipped,
    "foreign": foreign,
    "older": older,
    "other": other,
    "stopped": stopped,
}
FAULTS = list(FAULTS_BY_NAME)


def travel(folder: Path, pieces: int, seed: int) -> Journey:
    """Cut the blocks into so many pieces in all, and let each be trained somewhere."""
    dice = random.Random(seed)
    journey = Journey(folder, dice)
    ends = dice.sample([(block, step) for block in range(BLOCKS) for step in range(1, STEPS)], pieces - BLOCKS)
    left = [[*sorted(step for block, step in ends if block == of), None] for of in range(BLOCKS)]
    while any(left):
        open_blocks = [block for block in range(BLOCKS) if left[block]]
        blocks = dice.sample(open_blocks, min(len(open_blocks), dice.choice((2, 3))))
        journey.hand_over({block: left[block].pop(0) for block in blocks})
    return journey


def check(journey: Journey, expected: dict[str, bytes]) -> None:
    home = journey.at("home")
    gather(home, [files[-1] for files in journey.packed])
    assert missing(home) == []
    assert shards(journey.folder / "home" / "run", STEPS) == expected
    made_at = {(c.place, c.attempt) for b in range(BLOCKS) if (c := home.block(b).checkpoints.newest_commit())}
    print(f"{sum(map(len, journey.packed))} packed, faults {journey.faults}, last made at {made_at}")


def test_ten_random_hand_overs(tmp_path: Path, expected: dict[str, bytes]) -> None:
    journey = travel(tmp_path, 10, seed=11)
    check(journey, expected)
    assert set(journey.faults) == set(FAULTS)


@pytest.mark.long
@pytest.mark.timeout(20_000)
def test_a_hundred_random_hand_overs(tmp_path: Path, expected: dict[str, bytes]) -> None:
    journey = travel(tmp_path, 100, seed=100)
    check(journey, expected)
    assert set(journey.faults) == set(FAULTS)
