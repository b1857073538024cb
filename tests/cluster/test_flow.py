"""Flow matching end to end: a tiny DiT in two blocks, one killed on the way, sampled, and beside its baseline."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cluster.test_dit import CONFIG, SMALL, STEPS
from tests.conftest import Command, shards

FLOW = ["noise.process=flow", "noise.shift=3", "noise.logit_mean=0.2"]

pytestmark = pytest.mark.cluster


def test_it_resumes_bitwise_samples_and_has_a_baseline(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    arguments = ["train", CONFIG, *SMALL, *FLOW]
    killed = dbtrain(*arguments, "out=killed", faults=[{"block": 1, "step": 13, "kind": "kill"}])
    assert killed.wait() == 0, killed.output()
    assert len(list((tmp_path / "killed/run/blocks/01/attempts").iterdir())) == 2
    quiet = dbtrain(*arguments, "out=quiet", "--blocks", "1")
    assert quiet.wait() == 0, quiet.output()
    one, two = (shards(tmp_path / out / "run", STEPS) for out in ("quiet", "killed"))
    assert len(one) == 3 and len(two) == 6 and one.items() <= two.items()
    whole = dbtrain("baseline", CONFIG, *SMALL, *FLOW, "out=killed", "--kind", "end_to_end")
    assert whole.wait() == 0, whole.output()
    for run, solver, spacing in (("run", "heun", "karras"), ("run-end-to-end", "euler", "slices")):
        steps = ["--steps", "4", "--solver", solver, "--spacing", spacing]
        drawn = dbtrain("sample", f"killed/{run}", "--count", "9", *steps, "--guidance", "1.5", "--out", "a.png")
        assert drawn.wait() == 0, drawn.output()
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.size == (3 * 64 + 4, 3 * 64 + 4)
        (tmp_path / "a.png").unlink()
    measured = dbtrain("losses", "killed/run")
    assert measured.wait() == 0 and "boundary" in measured.output(), measured.output()
