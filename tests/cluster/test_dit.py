"""The tiny DiT end to end: trained with a worker killed on the way, merged, sampled."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, Command, shards

CONFIG = str(ROOT / "configs" / "dit_digits.yaml")
STEPS = 20
SMALL = [
    "name=run",
    "blocks=2",
    "model.depth=2",
    "model.dim=16",
    "model.heads=2",
    f"training.steps={STEPS}",
    "training.checkpoint_every=8",
    "training.log_every=4",
    "training.batch_size=16",
    "cluster.backoff_s=0.1",
]

pytestmark = [pytest.mark.cluster, pytest.mark.long]  # tests/cluster/test_flow.py shows the same under another noise


def test_it_trains_resumes_bitwise_merges_and_samples(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    arguments = ["train", CONFIG, *SMALL]
    killed = dbtrain(*arguments, "out=killed", faults=[{"block": 1, "step": 13, "kind": "kill"}])
    assert killed.wait() == 0, killed.output()
    assert len(list((tmp_path / "killed/run/blocks/01/attempts").iterdir())) == 2
    quiet = dbtrain(*arguments, "out=quiet", "--blocks", "1")
    assert quiet.wait() == 0, quiet.output()
    one, two = (shards(tmp_path / out / "run", STEPS) for out in ("quiet", "killed"))
    assert len(one) == 3 and len(two) == 6 and one.items() <= two.items()
    drawn = dbtrain("sample", "killed/run", "--count", "9", "--steps", "4", "--guidance", "1.5", "--out", "a.png")
    assert drawn.wait() == 0, drawn.output()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 64 + 4, 3 * 64 + 4)
