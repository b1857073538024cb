"""A network of another library by the commands: from its folder, in blocks, killed, resumed bitwise, and merged.

tests/resume/test_other_libraries.py shows the same of all classes without the command, and so without Ray.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dbtrain.models.adapters.names import our_name
from dbtrain.models.registry import architecture
from tests.conftest import Command, shards
from tests.unit.models.originals import original

pytestmark = pytest.mark.cluster


RANGE = {"noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0}, "codebook": {"dim": 32}}
TEXT = {"data": {"source": "python_topics", "tokenizer": "letters", "length": 16, "cache": "cache"}}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("hf_vit", RANGE),
        pytest.param("hf_llama", {**RANGE, **TEXT}, marks=pytest.mark.long),
        pytest.param("hf_dit", {}, marks=pytest.mark.long),
        pytest.param("hf_wan", {}, marks=pytest.mark.long),
    ],
)
def test_a_network_starts_from_its_folder_and_resumes_bitwise(
    dbtrain: Callable[..., Command], tmp_path: Path, arch: str, changes: dict[str, Any]
) -> None:
    network = original(arch, tmp_path / "pretrained")
    content = {
        "name": "run",
        "blocks": 2,
        "model": {"arch": arch, "config": "pretrained"},
        "init": {"from": "pretrained"},
        "data": {"source": "digits"},
        **changes,
        "training": {"steps": 12, "batch_size": 32, "checkpoint_every": 5, "optimizer": {"lr": 1e-9, "warmup": 1}},
        "cluster": {"cpus_per_worker": 0.5, "backoff_s": 0.1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    quiet = dbtrain("train", "run.yaml", "out=quiet", "--blocks", "1")
    assert quiet.wait() == 0, quiet.output()
    killed = dbtrain("train", "run.yaml", "out=killed", faults=[{"block": 1, "step": 8, "kind": "kill"}])
    assert killed.wait() == 0, killed.output()
    assert len(list((tmp_path / "killed/run/blocks/01/attempts").iterdir())) == 2
    one, two = (shards(tmp_path / out / "run", 12) for out in ("quiet", "killed"))
    assert len(one) == 3 and len(two) == 6 and one.items() <= two.items()
    assert "equals the blocks bit for bit" in killed.output()

    from safetensors.torch import load_file

    stack = architecture(arch).stack
    # at so small a rate a block is still what it started from, but for what was added
    own = load_file(tmp_path / "quiet/run/blocks/01/step_00000012/model.safetensors")
    for name, value in network.named_parameters():
        mine = our_name(stack, name)
        mine = mine if mine.startswith("layers.") else f"blocks.1.{mine}"
        if mine in own:
            torch.testing.assert_close(own.pop(mine), value.detach(), atol=1e-6, rtol=0)
    assert bool(own) == (arch != "hf_dit") and all(".added." in name for name in own)
