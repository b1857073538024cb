"""Mistakes that once showed a traceback or spent a run's name."""

from pathlib import Path

import pytest
import torch

from dbtrain.config import load_config
from dbtrain.data.images import read_idx
from dbtrain.errors import ConfigError, DataError
from dbtrain.method.levels import LogUniform
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.training.fault_injection import FaultPlan

DIGITS = str(Path(__file__).parents[2] / "configs" / "vit_digits.yaml")


@pytest.mark.parametrize("content", [b"- 1\n- 2\n", b"7\n", b"\xff\xfe\x00", None])
def test_a_file_that_is_no_configuration(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_config(path)


def test_edges_that_end_in_zero_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = load_config(DIGITS, [f"out={tmp_path}", "noise.ranges=explicit", "noise.edges=[7,2,1,0]"])
    with pytest.raises(ConfigError, match="sigma_min=0"):
        prepare(config, Run(Store(config.run_url)), lambda *_: {})
    assert not (tmp_path / "vit-digits" / "run.json").exists()


def test_what_differs_is_named_among_what_matters(tmp_path: Path) -> None:
    overrides = [f"out={tmp_path}", "noise.ranges=uniform"]
    config = load_config(DIGITS, overrides)
    prepare(config, Run(Store(config.run_url)), lambda *_: {})
    other = load_config(DIGITS, [*overrides, "training.micro_batch=8", "training.zero_stage=1", "training.ema=0.5"])
    with pytest.raises(ConfigError, match=r"training.ema: 0.99 in run.json, 0.5 now;"):
        prepare(other, Run(Store(config.run_url)), lambda *_: {})


def test_an_idx_header_that_overflows(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + (2**31).to_bytes(4, "big") * 2 + (4).to_bytes(4, "big"))
    with pytest.raises(DataError, match="cut short"):
        read_idx(path, 3)


@pytest.mark.parametrize("text", ['[{"block": 1, "step": 3}]', '[{"block": 1, "step": "3", "kind": "kill"}]'])
def test_a_malformed_fault_plan_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBTRAIN_FAULTS", text)
    with pytest.raises(ConfigError, match="DBTRAIN_FAULTS"):
        FaultPlan.from_environment(1, Store(str(tmp_path)))


def test_the_top_quantile_is_the_top_level() -> None:
    generator = torch.Generator().manual_seed(0)
    for low, factor in torch.rand(200, 2, generator=generator, dtype=torch.float64).tolist():
        distribution = LogUniform(low + 1e-3, (low + 1e-3) * (1.5 + 100 * factor))
        assert float(distribution.quantile(torch.tensor(1.0, dtype=torch.float64))) <= distribution.high
