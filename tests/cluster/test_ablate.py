"""A grid of runs, baselines among them, killed in the middle and continued."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, Command, events, wait_for

CONFIG = str(ROOT / "configs" / "vit_digits.yaml")
RUNS = ("vit-digits-b2-s0-greedy", "vit-digits-b2-s0-joint", "vit-digits-b2-uniform-back-s0")

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def test_a_killed_ablation_continues_where_it_was(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    axes = ["--blocks", "2", "--ranges", "uniform", "--partitions", "back", "--seeds", "0"]
    arguments = ["ablate", CONFIG, *TINY, "training.steps=30", *axes, "--baselines", "greedy,joint"]
    runs = [tmp_path / "runs" / name for name in RUNS]
    killed = dbtrain(*arguments)
    wait_for((runs[0] / "evaluation.json").exists, 300, f"the first run's evaluation; so far {killed.output()}")
    killed.kill()
    first = {path: path.read_bytes() for path in runs[0].rglob("*.safetensors")}
    assert len(list(runs[0].glob("blocks/*"))) == 2 and not (runs[2] / "evaluation.json").exists()
    again = dbtrain(*arguments)
    assert again.wait() == 0, again.output()
    assert {path: path.read_bytes() for path in runs[0].rglob("*.safetensors")} == first
    assert [len(list(path.iterdir())) for path in runs[0].glob("blocks/*/attempts")] == [1, 1]
    assert len(list(runs[1].glob("blocks/*"))) == 1 and json.loads((runs[1] / "run.json").read_text())["slices"]
    rows = json.loads((tmp_path / "vit-digits-ablation" / "ablation.json").read_text())
    found = [(row["blocks"], row["ranges"], row["partition"]) for row in rows]
    assert found == [(2, "greedy", "even"), (2, "joint", "even"), (2, "uniform", "back")]
    assert (tmp_path / "vit-digits-ablation" / "ablation.png").exists()
    for row in rows:
        assert row["scores"]["test"]["mean"]["mean"] > 0 and row["flops"] > 0


def test_ctrl_c_lets_the_run_that_has_begun_commit_and_begins_no_other(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    axes = ["--blocks", "1,2", "--ranges", "uniform", "--seeds", "0", "--baselines", ""]
    command = dbtrain("ablate", CONFIG, *TINY, "training.steps=100000", *axes)
    first, second = (tmp_path / "runs" / f"vit-digits-b{count}-uniform-s0" for count in (1, 2))
    wait_for(lambda: any(e["event"] == "commit" for e in events(first, 0)), 300, f"a commit; {command.output()}")
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does: to the command and all that it started
    asked = time.monotonic()
    assert command.wait(300) == 130, command.output()
    print(f"it ended {time.monotonic() - asked:.1f} s after Ctrl-C")
    assert events(first, 0)[-1]["event"] == "end" and events(first, 0)[-1]["outcome"] == "stopped"
    assert not second.exists()
    assert "Traceback" not in command.output()
