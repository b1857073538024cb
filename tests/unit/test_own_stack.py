"""A `Stack` of the user's: that of docs/own-network.md, and classes that have none or cannot have one."""

import importlib
import sys

import pytest
import torch
from torch import nn

from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.models.adapters.find import candidates, told, unfit
from dbtrain.models.adapters.names import is_added
from dbtrain.models.import_path import own_class
from dbtrain.models.registry import checked
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.own_network import fenced

BASE = {
    "name": "run",
    "blocks": 2,
    "model": {"arch": "my_gpt2:GPT2", "depth": 4, "config": {"n_embd": 64, "n_head": 2}},
    "data": {"source": "python_topics", "tokenizer": "letters", "length": 16},
    "codebook": {"dim": 32},
    "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    "training": {"steps": 4, "batch_size": 8},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Current directory with the document's file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = fenced("py", "class GPT2")
    (tmp_path / "my_gpt2.py").write_text(code)
    of = "from diffusers import LatteTransformer3DModel\n\n\nclass Mine(LatteTransformer3DModel):\n    pass\n"
    (tmp_path / "my_latte.py").write_text(of)
    forget()
    yield tmp_path
    forget()


def forget():
    sys.modules.pop("my_gpt2", None)
    sys.modules.pop("my_latte", None)
    own_class.cache_clear()
    checked.cache_clear()
    importlib.invalidate_caches()


def never(*_):
    raise AssertionError("nothing here needs a calibration")


def planned(folder, **changes):
    config = load_config(None, [f"out={folder}/runs"], base={**BASE, **changes})
    store = Store(config.run_url)
    store.makedirs()
    return prepare(config, Run(store), never)


@torch.no_grad()
def test_the_stack_of_the_document_is_trained_in_blocks_and_is_the_original_in_one(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    run_plan = planned(folder)
    model = run_plan.model(1)
    assert list(model.layers) == ["2", "3"]
    assert {name.split(".")[-1] for name, _ in model.named_parameters() if is_added(name)} == {"weight", "bias"}
    whole = planned(folder / "whole", blocks=1).model(0).eval()
    network = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=2, n_layer=4, vocab_size=28)).eval()
    own = dict(whole.named_parameters())
    for name, value in network.named_parameters():
        group = "layers." + name.removeprefix("transformer.h.") if ".h." in name else None
        own[group or ("head." if ".ln_f." in name else "stem.") + (group and "" or name)].copy_(value)
    tokens = torch.randint(27, (2, 16))
    codes = torch.randn(2, 16, 32)
    given = whole.predict(range(4), codes, torch.full((2, 16), 3.0), tokens)
    assert torch.equal(given, network(tokens).logits[..., :27])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('task = "continue"', 'task = "guess"', "GPT2.task='guess' is none of classify, denoise, continue"),
        ('layers = "transformer.h"', "lists = None", "GPT2 lacks layers: write task"),
        ("def close(", "def shut(", "my_gpt2:GPT2 is no BlockModel"),
    ],
)
def test_what_a_stack_lacks_is_told(folder, old, new, message):
    text = (folder / "my_gpt2.py").read_text()
    assert old in text
    (folder / "my_gpt2.py").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        planned(folder)


def test_a_stack_that_does_not_count_its_layers_needs_the_depth(folder):
    with pytest.raises(ConfigError, match="model.depth is missing: GPT2 does not say how many layers it has"):
        planned(folder, model={"arch": "my_gpt2:GPT2", "config": {"n_embd": 64, "n_head": 2}})


def named(arch):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"model.arch={arch}"], base={**BASE, "model": {"depth": 4}})
    return str(caught.value)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("transformers:GPT2LMHeadModel", "its layers may be transformer.h (12 of GPT2Block): write a Stack"),
        ("transformers:LlamaForCausalLM", "there is a row for it: model.arch=hf_llama"),
        ("diffusers:FluxTransformer2DModel", "transformer_blocks (19 of FluxTransformerBlock), or single_transformer_"),
        ("diffusers:HunyuanDiT2DModel", "cannot be cut into blocks either, since layers of its second half read what"),
        ("diffusers:UNet2DModel", "long skips"),
        ("diffusers:LatteTransformer3DModel", "its lists of layers take turns"),
        ("diffusers:WanVACETransformer3DModel", "one of its lists of layers feeds the other"),
        ("diffusers:ConsisIDTransformer3DModel", "layers at several depths read what a network beside them makes"),
        ("diffusers:UNetControlNetXSModel", "long skips"),
        ("my_latte:Mine", "its lists of layers take turns"),
    ],
)
def test_a_class_of_another_library_is_looked_at_and_told_of(arch, message):
    assert message in named(arch)


class Layer(nn.Module):
    pass


def test_the_librarys_plan_of_a_pipeline_comes_first_then_what_it_never_splits_then_the_longest():
    network = nn.Module()
    network.short = nn.ModuleList([Layer() for _ in range(2)])
    network.long = nn.ModuleList([nn.Identity() for _ in range(5)])
    network.mixed = nn.ModuleList([nn.Identity(), Layer(), *(nn.Identity() for _ in range(9))])
    assert candidates(network) == ["long (5 of Identity)"]
    network._no_split_modules = ["Layer"]
    assert candidates(network) == ["short (2 of Layer)"]
    network.config = type("Config", (), {"base_model_pp_plan": {"long": (["x"], ["x"])}})
    assert candidates(network) == ["long (5 of Identity)"]
    assert unfit(network) == ""
    network.short[1].skip_linear = nn.Linear(2, 2)
    assert "long skips" in unfit(network)


def test_a_network_without_layers_or_default_settings_is_told_of_too():
    class Wants(nn.Module):
        def __init__(self, width):
            super().__init__()

    assert told(Wants) == told(nn.Identity) == "no list of layers was found in it that a Stack could name"
