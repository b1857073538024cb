"""A run that is extended and killed ends with the bits of one that was only extended, or, under wsd, of one that was as
long from the beginning."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TRAIN, Command, events, shards

pytestmark = [pytest.mark.fault, pytest.mark.cluster, pytest.mark.timeout(1200)]

SHORT, LONG = 40, 60
OWN = ["blocks=1", f"training.steps={SHORT}", "training.optimizer.warmup=10"]
WSD = ["training.optimizer.schedule=wsd", "training.optimizer.decay=0.3"]
HELD = 28
"""Where the decay of 40 steps begins."""
FAULTS = [
    {"block": 0, "step": 41, "kind": "kill"},
    {"block": 0, "step": 50, "kind": "kill_in_commit"},
    {"block": 0, "step": 55, "kind": "kill"},
]


def run_to_its_end(command: Command) -> str:
    assert command.wait(600) == 0, command.output()
    return " ".join(command.output().split())


def test_an_extended_wsd_run_that_was_killed_has_the_bits_of_one_that_was_as_long_from_the_beginning(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    run_to_its_end(dbtrain(*TRAIN, *OWN, *WSD, f"training.steps={LONG}", "out=whole"))
    run_to_its_end(dbtrain(*TRAIN, *OWN, *WSD))
    run = tmp_path / "runs" / "run"
    decayed = shards(run, SHORT)
    told = run_to_its_end(dbtrain("extend", str(run), f"training.steps={LONG}"))
    assert f"it goes on at the peak rate from step {HELD}, where its decay began" in told
    run_to_its_end(dbtrain("resume", str(run), faults=FAULTS))
    resumed = [e["step"] for e in events(run, 0) if e["event"] == "resumed"]
    assert resumed == [HELD, 40, 42, 50], resumed  # 42: where the decay of 60 steps begins
    wanted = shards(tmp_path / "whole" / "run", LONG)
    assert len(wanted) == 3 and shards(run, LONG) == wanted
    aside = {
        f"{p.parts[-4]}/{p.name}": p.read_bytes()
        for p in run.glob(f"blocks/*/schedule_of_{SHORT}_steps/step_{SHORT:08d}/*.safetensors")
    }
    assert aside == decayed


@pytest.mark.long  # how it is killed and resumed is shown above, and its rates in tests/unit/run/test_run_schedule.py
def test_an_extended_cosine_that_was_killed_has_the_bits_of_one_that_was_not(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    run_to_its_end(dbtrain(*TRAIN, *OWN))
    runs = [tmp_path / "runs" / "run", tmp_path / "killed" / "run"]
    shutil.copytree(*runs)
    for run, faults in zip(runs, ([], FAULTS), strict=True):
        run_to_its_end(dbtrain("extend", str(run), f"training.steps={LONG}"))
        run_to_its_end(dbtrain("resume", str(run), faults=faults))
    whole, killed = (shards(run, LONG) for run in runs)
    assert len(whole) == 3 and killed == whole
    assert [e["step"] for e in events(runs[1], 0) if e["event"] == "resumed"] == [40, 40, 40, 50]
    rates = {e["step"]: e["lr"] for e in events(runs[0], 0) if e["event"] == "step"}
    assert rates[SHORT] < rates[SHORT + 5] > rates[LONG]
