"""The commands with the blocks in processes of a real cluster: the same bits, also when a process is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run.run import Run
from tests.conftest import ROOT, ray_folder, wait_for
from tests.unit.small_runs import commit, settled

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(900)]

DIT = {"model": {"arch": "dit", "patch": 2, "depth": 5, "dim": 48, "heads": 2}, "codebook": {}}
STEPS = "evaluation.steps=60"
HOLDS = "ray::Holder"


def dbtrain(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "dbtrain", *command],
        # a process of Ray's computes with one thread
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": ray_folder(),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "300",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: "subprocess.Popen[str]") -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


def seen(command: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes with blocks, some seconds after one of them began to answer."""

    def holders(doing: str = "") -> list[psutil.Process]:
        below = psutil.Process(command.pid).children(recursive=True)
        return [process for process in below if " ".join(process.cmdline()).startswith(HOLDS + doing)]

    wait_for(lambda: command.poll() is not None or bool(holders(".call")), 300, "an answer of a process")
    time.sleep(3)
    assert command.poll() is None, command.communicate()[0]
    return holders()


def test_samples_are_the_same_bits_though_a_process_is_killed(tmp_path: Path) -> None:
    run = settled(tmp_path, **DIT)
    commit(run)
    merge_and_verify(Run(run))
    own = ["--count", "96", "evaluation.batch_size=8", STEPS]
    said(dbtrain("sample", run.url, "--out", str(tmp_path / "here.npy"), *own))
    pipeline = dbtrain("sample", run.url, "--out", str(tmp_path / "there.npy"), *own, "evaluation.resident=pipeline")
    seen(pipeline)[0].send_signal(signal.SIGKILL)
    assert "a pipeline of 2 processes (cpu)" in said(pipeline)
    assert np.array_equal(np.load(tmp_path / "here.npy"), np.load(tmp_path / "there.npy"))


def test_scores_are_the_same_bits_and_a_signal_ends_it(tmp_path: Path) -> None:
    run = settled(tmp_path)
    commit(run)
    merge_and_verify(Run(run))
    said(dbtrain("eval", run.url))
    here = json.loads(run.read("evaluation.json"))
    assert "a pipeline of 2 processes" in said(dbtrain("eval", run.url, "evaluation.resident=pipeline"))
    assert json.loads(run.read("evaluation.json")) == here
    ends_by(signal.SIGTERM, 143, run.url)


def ends_by(number: signal.Signals, code: int, url: str) -> None:
    """A signal ends a long evaluation in a pipeline, with one line and no process left."""
    long = dbtrain(
        "eval", url, "evaluation.resident=pipeline", "evaluation.batch_size=1", "evaluation.steps_per_block=9"
    )
    seen(long)
    below = psutil.Process(long.pid).children(recursive=True)
    long.send_signal(number)
    output = long.communicate(timeout=120)[0]
    assert long.returncode == code and "Traceback" not in output and "SIGTERM received" not in output, output
    assert not psutil.wait_procs(below, 60)[1]
