"""Every architecture resumes bitwise under every pair of settings of a worker; what is refused is refused in words."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain.errors import ConfigError
from tests.conftest import ROOT
from tests.resume.covering_array import FACTORS, ROWS, config_of


def pairs(row):
    return {((i, row[i]), (j, row[j])) for i, j in itertools.combinations(range(len(row)), 2)}


def allowed(row):
    try:
        config_of(row)
    except ConfigError as error:
        assert "training.offload" in str(error) or "model.loops" in str(error), error
        return False
    return True


def test_the_array_covers_every_pair_that_the_configuration_allows():
    wanted = set().union(*(pairs(row) for row in itertools.product(*FACTORS.values()) if allowed(row)))
    assert all(allowed(row) for row in ROWS)
    assert wanted == set().union(*map(pairs, ROWS)) and len(wanted) == 222


@pytest.mark.fault
@pytest.mark.parametrize("workers", FACTORS["workers"])
def test_every_row_resumes_bitwise_and_sees_an_infinite_gradient(workers: int, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    # without the compiler, which would take most of the time for Muon's many shapes
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/resume/covering_array.py"), str(out)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [tuple(result["row"]) for result in results] == [row for row in ROWS if row[2] == workers]
    for result in results:
        assert not result["differs"] and result["moved"] > 0.9 and result["infinite"] == "seen", result
