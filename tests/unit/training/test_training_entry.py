"""The settings of a worker's process, on which bitwise repetition depends.

On a GPU the attention of these lengths is the case that matters: with ``warn_only`` its backward pass differed from
call to call from 1,024 positions on (H100, PyTorch 2.11, bf16 by cuDNN and float32 by the memory-efficient kernel).
"""

import os
from typing import Any

import pytest
import torch
from torch import nn

from dbtrain.method.flow import FlowNoise, LogitNormal
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.interface import BlockModel
from dbtrain.method.levels import LogNormal
from dbtrain.method.masking import MaskingNoise
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import PARAMETRISATIONS
from dbtrain.models.registry import ARCHITECTURES, architecture
from dbtrain.training import entry
from dbtrain.training.assignment import Assignment
from dbtrain.training.entry import prepare_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, CLASSES, POSITIONS, SIDE = 27, 10, 1024, 32
SETTINGS = {
    "hf_vit": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 1},
    "hf_dit": {"num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 1},
    "hf_wan": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ffn_dim": 32,
        "text_dim": 8,
        "freq_dim": 16,
        "patch_size": [1, 1, 1],
    },
    "hf_llama": {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
}
"""Of one layer of other libraries' classes."""


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """This process as a worker's, and as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_process(Assignment("run", 0, 1, "token", "session", 1, None, DEVICE, 1, 60.0))
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32


def objective(arch: str, precision: str) -> tuple[BlockObjective, dict[str, torch.Tensor]]:
    """A model of one layer, whose zeros are filled so that every parameter gets a gradient; and a batch of two."""
    row = architecture(arch)
    text = "image" not in row.takes
    gaussian = GaussianNoise(LogNormal(-1.2, 1.2, 0.01, 80.0), 0.125, per_position=row.per_position)
    arguments = {"noise": MaskingNoise(VOCABULARY) if row.natural_noise == "masking" else gaussian}
    arguments["parametrisation"] = PARAMETRISATIONS[row.natural_parametrisation](0.125, "unit")
    outside = {"image": (1, SIDE, SIDE), "classes": CLASSES, "vocabulary": VOCABULARY}
    arguments |= row.from_shape(outside)
    torch.manual_seed(0)
    if row.codes:
        arguments["codebook"] = nn.functional.normalize(torch.randn(outside[row.codes], 16), dim=1)
    arguments |= {} if text else {"patch": 1}
    if row.stack:
        return _adapted(arch, row, arguments, text, precision)
    arguments |= {"prelude": 0, "coda": 0, "iterations": 1, "backprop": 1} if arch == "recurrent" else {}
    return _with_batch(row(depth=1, dim=32, heads=2, **arguments), text, precision)


def _adapted(
    arch: str, row: type[BlockModel], arguments: dict[str, Any], text: bool, precision: str
) -> tuple[BlockObjective, dict[str, torch.Tensor]]:
    """The same of a class of another library."""
    arguments.pop("patch", None)
    name = row.natural_parametrisation
    if row.natural_noise == "flow":
        arguments["noise"] = FlowNoise(LogitNormal(0.0, 1.0, 1.0))
        name = FlowNoise.parametrisations[name]
    arguments["parametrisation"] = PARAMETRISATIONS[name](0.125, "unit")
    keys = row.completed({"config": SETTINGS[arch], "depth": 1})
    return _with_batch(row(**keys, **arguments), text, precision)


def _with_batch(model: BlockModel, text: bool, precision: str) -> tuple[BlockObjective, dict[str, torch.Tensor]]:
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    tokens = {"tokens": torch.randint(VOCABULARY, (2, POSITIONS))}
    images = {"image": torch.randn(2, 1, SIDE, SIDE), "label": torch.tensor([3, 7])}
    batch = {name: tensor.to(DEVICE) for name, tensor in (tokens if text else images).items()}
    return BlockObjective(model, range(1), 0.3, 0.9, precision).to(DEVICE), batch


def test_what_cannot_be_repeated_is_refused_and_not_only_warned_of():
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_over_a_thousand_positions_are_the_same_bits_each_time(arch, precision):
    module, batch = objective(arch, precision)
    found = []
    for _ in range(3):
        module.zero_grad()
        module(batch, torch.tensor(5, device=DEVICE), torch.arange(2, device=DEVICE)).backward()
        found.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
    for again in found[1:]:
        assert [name for name in again if not torch.equal(again[name], found[0][name])] == []


class Checked:
    """A matrix of a PyTorch that checks cuBLAS's workspaces at the first product, or at each."""

    def __init__(self, each: bool) -> None:
        self.each, self.products = each, 0

    def mm(self, other: "Checked") -> "Checked":
        self.products += 1
        if (self.each or self.products == 1) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
            raise RuntimeError("Deterministic behavior was enabled with either ...")
        return self


@pytest.mark.parametrize(
    ("value", "each", "after"), [(":4096:8", False, None), (":4096:8", True, ":4096:8"), (":16:8", False, ":16:8")]
)
def test_pytorch_is_not_left_to_parse_the_workspaces_at_every_product(monkeypatch, value, each, after):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    monkeypatch.setattr(torch, "ones", lambda *_, device: Checked(each))
    entry._check_workspaces_once(torch.device("cpu"))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == after
