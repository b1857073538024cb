"""A run whose directory is full or read-only: results are shown first, then it is said what could not be written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run.run import Run
from tests.unit.small_runs import commit, settled

DIT = {"model": {"arch": "dit", "depth": 2, "dim": 12, "heads": 2, "patch": 4}, "noise": {"ranges": "paper"}}


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        message = f"cannot mount here: {done.stderr.strip()}"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@pytest.fixture(params=["full", "read-only"])
def closed(request, tmp_path):
    """(folder for runs, call that closes it, what is then said of it)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", disk)

    def close():
        if request.param == "full":
            with (disk / "filler").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    return
        mount("-o", "remount,ro", disk)

    yield disk, close, "the disk is full" if request.param == "full" else "Read-only file system"
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def told(*command):
    result = CliRunner().invoke(cli.app, list(command))
    return result.exit_code, " ".join(result.output.split())


def test_scores_and_losses_are_shown_though_they_cannot_be_kept(closed, monkeypatch):
    disk, close, why = closed
    run = settled(disk)
    commit(run)
    merge_and_verify(Run(run))
    close()
    monkeypatch.setenv("COLUMNS", "200")
    code, said = told("eval", run.url)
    assert code == 1 and re.search(r"mean over the chain . \d+\.\d\d . \d+\.\d\d", said)
    assert (
        f"the scores are complete and shown above, but evaluation.json is not written: cannot write {run.url}" in said
    )
    assert why in said and "bug" not in said
    code, said = told("losses", run.url, "--levels", "3", "--samples", "20")
    assert (
        code == 1 and said.count("boundary") == 2 and said.index("boundary") < said.index("losses.json is not written")
    )
    code, said = told("inspect", run.url)
    assert code == 0 and said.count("whole") == 2


def test_samples_that_were_drawn_are_kept_elsewhere(closed, tmp_path, monkeypatch):
    disk, close, why = closed
    run = settled(disk, **DIT)
    commit(run)
    merge_and_verify(Run(run))
    close()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    few = ["--count", "2", "--steps", "2"]
    code, said = told("sample", run.url, *few)
    assert code == 1 and why in said
    saved = Path(re.search(r"the samples that were drawn are in (\S+\.png)", said)[1])
    assert saved.parent == tmp_path / "temporary" and saved.read_bytes().startswith(b"\x89PNG")
    code, said = told("sample", run.url, *few, "--out", f"{disk}/a.npy")
    assert code == 2 and "cannot be written" in said
    assert np.load(re.search(r"drawn are in (\S+\.npy)", said)[1]).shape == (2, 1, 8, 8)


def test_a_merge_that_cannot_be_written_leaves_none(closed):
    disk, close, why = closed
    run = settled(disk)
    commit(run)
    close()
    code, said = told("merge", run.url)
    assert code == 1 and why in said and not run.exists("merged") and "bug" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_what_is_sent_to_a_full_disk_is_no_bug():
    for command in (["version"], ["plan", "configs/vit_digits.yaml", "noise.ranges=paper"]):
        with open("/dev/full", "w") as full:
            root = Path(__file__).parents[3]
            words = [sys.executable, "-m", "dbtrain", *command]
            # with a buffer, as users have it: what is left in it is written when Python ends
            buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=root, env=buffered)
        assert done.returncode == 1 and "cannot be written (No space left on device)" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
