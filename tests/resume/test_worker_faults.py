"""Workers die in every way: the final shards are bitwise those of an undisturbed run, and other blocks lose no step."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtrain.coordinator.exit_reasons import KILLED
from tests.conftest import STEPS, TRAIN, Command, events, shards
from tests.unit.report.reader import Reader

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(900)]

FAULTS = {
    0: [],
    1: [(13, "kill"), (30, "kill_in_commit"), (45, "flip_model"), (55, "flip_commit")],
    2: [(13, "raise"), (23, "term"), (35, "memory"), (45, "flip_ema"), (55, "flip_optim"), (57, "nan")],
}
RESUMED = {
    0: [],
    # the newest commit, or the one before it when a bit of that flipped; a warning loses no step
    1: [10, 20, 30, 40],
    2: [10, 24, 30, 30, 40, 50],
}


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Directory of the run, and what the first command said; the second one has ended well."""
    folder = tmp_path_factory.mktemp("disturbed")
    faults = [{"block": b, "step": step, "kind": kind} for b in FAULTS for step, kind in FAULTS[b]]
    first = Command(folder, TRAIN, faults)
    try:
        assert first.wait(600) == 1, first.output()
        run = folder / "runs" / "run"
        assert len(shards(run, STEPS)) == 6, first.output()  # of those that did not fail
        second = Command(folder, TRAIN, faults)
        assert second.wait() == 0, second.output()
    finally:
        first.kill()
    yield run, first.output()


def test_the_shards_are_those_of_the_undisturbed_run(disturbed: tuple[Path, str], expected: dict[str, bytes]) -> None:
    assert shards(disturbed[0], STEPS) == expected


@pytest.mark.parametrize("block", FAULTS)
def test_each_fault_fired_once_and_cost_one_attempt_of_its_block_alone(block: int, disturbed: tuple[Path, str]) -> None:
    folder = disturbed[0] / "blocks" / f"{block:02d}"
    fired = sorted(p.name for p in folder.glob("faults/*") if not p.name.startswith("."))
    assert fired == sorted(f"{kind}-{step}" for step, kind in FAULTS[block])
    assert len(list(folder.glob("attempts/*"))) == 1 + len(FAULTS[block])
    assert [e["step"] for e in events(disturbed[0], block) if e["event"] == "resumed"] == RESUMED[block]


@pytest.mark.parametrize("block", FAULTS)
def test_no_step_is_done_twice_but_those_after_the_commit(block: int, disturbed: tuple[Path, str]) -> None:
    at = 0
    for event in events(disturbed[0], block):
        if event["event"] == "resumed":
            at = event["step"]
        if event["event"] == "step":
            assert event["step"] - event["steps"] == at  # windows of steps follow each other without gap or overlap
            at = event["step"]
    assert at == STEPS


def test_damaged_checkpoints_are_named(disturbed: tuple[Path, str]) -> None:
    for block, named in ((1, ["model.safetensors", "COMMIT.json"]), (2, ["ema.safetensors", "optim.safetensors"])):
        reasons = [e["reason"] for e in events(disturbed[0], block) if e["event"] == "skipped"]
        assert len(reasons) == 2
        assert all(name in reason for name, reason in zip(named, reasons, strict=True))
        told = "".join(disturbed[1].split())  # lines of the console are cut
        assert all("".join(reason.split()) in told for reason in reasons)


def test_crashes_and_preemptions_are_counted_apart(disturbed: tuple[Path, str]) -> None:
    told = disturbed[1]
    assert told.count("block 2: preempted") == 1
    assert told.count("block 1: crashed") == 4
    kills = sum("kill" in kind or "flip" in kind for block in FAULTS for _, kind in FAULTS[block])
    assert " ".join(told.split()).count(f"comes back ({KILLED})") == kills  # not half a page of Ray's each time
    assert "Worker exit detail" not in told
    assert "MemoryError" in told
    assert "injected fault" in told


def test_a_block_whose_loss_explodes_fails_alone_and_keeps_its_commits(disturbed: tuple[Path, str]) -> None:
    told = " ".join(disturbed[1].split())
    assert "the loss of step 58 is nan" in told
    assert "2 of 3 blocks are done" in told
    assert "Traceback" not in told
    state = json.loads((disturbed[0] / "blocks/02/state.json").read_text())
    assert state["phase"] == "done"  # after the second command


def test_the_report_has_the_numbers_of_the_run_that_went_through_all_this(disturbed: tuple[Path, str]) -> None:
    """As a user sees it: measured, swept, and shown on one page."""
    run = disturbed[0]
    measuring = [Command(run.parents[1], [name, "runs/run"]) for name in ("eval", "losses", "sweep")]
    assert [command.wait() for command in measuring] == [0, 0, 0], [command.output() for command in measuring]
    told = Command(run.parents[1], ["report", "runs/run"])
    assert told.wait() == 0, told.output()
    page = Reader((run / "report.html").read_text())
    evaluation, losses, sweep = (json.loads((run / f"{n}.json").read_text()) for n in ("evaluation", "losses", "sweep"))

    accuracy = evaluation["scores"]["test"]["mean"]
    assert f"Done. {100 * accuracy:.2f} % accuracy" in told.output()
    assert [row[1] for row in page.rows if row[0] == "mean over the chain"] == [f"{100 * accuracy:.2f}"]
    found = [tuple(row) for row in page.rows if len(row) == 5]
    boundaries = {point["level"] for point in losses if point["boundary"]}
    plan = json.loads((run / "run.json").read_text())["plan"]
    assert boundaries == {float.fromhex(row["levels"][0]) for row in plan[:-1]} and sum(
        point["boundary"] for point in losses
    ) == 2 * len(boundaries)
    for point in losses:
        at = "boundary" if point["boundary"] else ""
        row = (f"{point['level']:.4g}", str(point["block"]), f"{point['loss']:.5f}", f"{point['weighted']:.4f}", at)
        assert row in found
    layers = sweep["sets"][0]["layers"]
    assert [row[2] for row in page.rows if row[0] == "classes"] == [f"{layer['r']:.3f}" for layer in layers]
    assert len({evaluation["weights"], sweep["weights"], *(point["weights"] for point in losses)}) == 1
    assert "Left out" not in page.text and "Unreadable" not in page.text

    for block, faults in FAULTS.items():
        attempts = [row for row in page.rows if len(row) == 9 and row[0] == f"block {block}"]
        assert len(attempts) == 1 + len(faults) and attempts[-1][7] == "done", attempts
        ends = [
            next((e["outcome"] for e in reversed(of) if e["event"] == "end"), "lost") for of in _by_attempt(run, block)
        ]
        assert [row[7] for row in attempts] == ends
        assert [int(row[5].split("\u2013")[0]) for row in attempts] == [0, *RESUMED[block]]
        last = [e for e in events(run, block) if e["event"] == "step"][-1]
        assert [f"block {block}", f"{last['step']}", f"{last['loss']:.4f}"] in [row[:3] for row in page.rows]


def _by_attempt(run: Path, block: int) -> list[list[dict[str, Any]]]:
    folders = sorted((run / f"blocks/{block:02d}/attempts").iterdir(), key=lambda path: int(path.name))
    return [[json.loads(line) for line in (folder / "events.jsonl").open()] for folder in folders]
