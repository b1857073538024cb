"""A network of transformers by the commands: from its folder, in blocks, killed, resumed bitwise, and merged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from dbtrain.models.adapters.names import our_name
from dbtrain.models.adapters.vit import ViTStack
from tests.conftest import Command, shards
from tests.unit.models.originals import original

pytestmark = pytest.mark.cluster


def test_a_vit_of_transformers_starts_from_its_folder_and_resumes_bitwise(
    dbtrain: Callable[..., Command], tmp_path: Path
) -> None:
    network = original("hf_vit", tmp_path / "pretrained")
    content = {
        "name": "vit",
        "blocks": 2,
        "model": {"arch": "hf_vit", "config": "pretrained"},
        "init": {"from": "pretrained"},
        "data": {"source": "digits"},
        "codebook": {"dim": 16},
        "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
        "training": {"steps": 12, "batch_size": 32, "checkpoint_every": 5, "optimizer": {"lr": 1e-9, "warmup": 1}},
        "cluster": {"cpus_per_worker": 0.5, "backoff_s": 0.1},
    }
    (tmp_path / "vit.yaml").write_text(yaml.safe_dump(content))
    quiet = dbtrain("train", "vit.yaml", "out=quiet")
    assert quiet.wait() == 0, quiet.output()
    killed = dbtrain("train", "vit.yaml", "out=killed", faults=[{"block": 1, "step": 8, "kind": "kill"}])
    assert killed.wait() == 0, killed.output()
    assert len(list((tmp_path / "killed/vit/blocks/01/attempts").iterdir())) == 2
    one, two = (shards(tmp_path / out / "vit", 12) for out in ("quiet", "killed"))
    assert len(one) == 6 and one == two
    assert "equals the blocks bit for bit" in killed.output()

    from safetensors.torch import load_file

    # at so small a rate a block is still what it started from, but for what was added
    own = load_file(tmp_path / "quiet/vit/blocks/01/step_00000012/model.safetensors")
    for name, value in network.named_parameters():
        mine = our_name(ViTStack, name)
        mine = mine if mine.startswith("layers.") else f"blocks.1.{mine}"
        if mine in own:
            torch.testing.assert_close(own.pop(mine), value.detach(), atol=1e-6, rtol=0)
    assert own and all(".added." in name for name in own)
