"""Pictures as people have them, through the commands that they type: a Parquet file of mixed sizes, a killed worker."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from tests.conftest import CONFIG, STEPS, TINY, Command, shards
from tests.unit.data.pictures import picture

pytestmark = pytest.mark.cluster
SIZES = ((37, 53), (53, 37), (64, 41))


def pets(folder: Path) -> Path:
    """Thirty pictures of three sizes, grey and in colour, in one file as the datasets library writes it."""
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "eel"])}
    rows = {
        "image": [picture(i, SIZES[i % 3], "L" if i % 5 == 0 else "RGB") for i in range(30)],
        "label": [i % 2 for i in range(30)],
    }
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(folder / "pets.parquet")
    return folder / "pets.parquet"


def test_a_parquet_file_is_trained_on_killed_resumed_and_evaluated_by_class(
    tmp_path: Path, dbtrain: Callable[..., Command]
) -> None:
    words = [CONFIG, "blocks=2", *TINY, "model.depth=2", "cluster.cpus_per_worker=0.5", "data.source=images"]
    words += [f"data.path={pets(tmp_path)}", f"data.cache={tmp_path}/cache"]
    wanted = ["data.size=[20,28]", "data.resize=pad", "data.channels=3"]
    refused = dbtrain("plan", *words)
    assert refused.wait() == 1 and "pets.parquet, row " in refused.output() and "data.channels" in refused.output()
    plain = dbtrain("train", *words, *wanted, "name=run", "out=plain", "--blocks", "1")
    assert plain.wait() == 0, plain.output()
    fault = {"block": 1, "step": 35, "kind": "kill"}
    killed = dbtrain("train", "--evaluate", *words, *wanted, "name=run", "out=killed", faults=[fault])
    assert killed.wait() == 0 and "attempt 2" in killed.output(), killed.output()
    assert "data: 24 training, 3 validation, 3 test pictures of 28x20 (width x height)" in killed.output()
    assert "class cat" in killed.output()
    expected = shards(tmp_path / "plain" / "run", STEPS)
    assert len(expected) == 3 and expected.items() <= shards(tmp_path / "killed" / "run", STEPS).items()
    manifest = read_manifest(Store(tmp_path / "plain" / "run"))
    assert manifest.class_names == ("cat", "eel") and len(manifest.data_notes) == 3
