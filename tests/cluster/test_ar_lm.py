"""The autoregressive language model as a user has it: trained as blocks, killed, merged, measured, generating."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.conftest import ROOT, Command, events, shards

CONFIG = str(ROOT / "configs" / "ar_tiny.yaml")
STEPS = 24
TINY = [
    "blocks=2",
    "model.depth=2",
    "model.dim=32",
    "data.source=text",
    "data.path=corpus",
    "data.length=32",
    "data.cache=cache",
    "codebook.dim=32",
    "noise.ranges=uniform",
    "noise.sigma_min=2",
    "noise.sigma_max=15",
    f"training.steps={STEPS}",
    "training.batch_size=16",
    "training.checkpoint_every=8",
    "training.optimizer.warmup=4",
    "evaluation.texts=64",
    "cluster.backoff_s=0.1",
]

pytestmark = pytest.mark.cluster


def test_a_language_model_trains_resumes_merges_and_writes(dbtrain: Callable[..., Command], tmp_path: Path) -> None:
    """From a text whose path and cache are relative to where the commands run, which is not where workers do."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "topics.txt").write_text("\n".join(topics[name] for name in sorted(topics)))
    whole = dbtrain("train", CONFIG, "out=whole", "name=run", *TINY, "--blocks", "1")
    assert whole.wait() == 0, whole.output()
    killed = dbtrain(
        "train", CONFIG, "out=killed", "name=run", *TINY, faults=[{"block": 1, "step": 13, "kind": "kill"}]
    )
    assert killed.wait() == 0, killed.output()
    assert "resumed" in [event["event"] for event in events(tmp_path / "killed/run", 1)]
    one, two = (shards(tmp_path / out / "run", STEPS) for out in ("whole", "killed"))
    assert len(one) == 3 and len(two) == 6 and one.items() <= two.items()
    evaluated = dbtrain("eval", "killed/run")
    assert evaluated.wait() == 0, evaluated.output()
    record = json.loads((tmp_path / "killed/run/evaluation.json").read_text())
    assert record["metric"] == "bits" and record["better"] == "lower"
    # log2(27) = 4.75 knows nothing; the frequencies of letters are worth 4.1
    assert all(2 < bits < 4.6 for bits in record["scores"]["test"].values())
    texts = []
    for seed in ("1", "1", "2"):
        written = dbtrain("generate", "killed/run", "--prompt", "the ", "--length", "20", "--seed", seed)
        assert written.wait() == 0, written.output()
        texts.append(written.output().splitlines()[-1])
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("the ") and len(t) == 24 for t in texts)
