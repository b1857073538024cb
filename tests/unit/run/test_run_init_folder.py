"""Pretrained networks of diffusers and transformers as the first weights of blocks, and every reason to refuse one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbtrain.errors import ConfigError, ShardError
from dbtrain.models.adapters.names import is_added, our_name
from dbtrain.run.initial_weights import new_names, read_block
from dbtrain.run.run import Run
from tests.unit.models.originals import CASES, SETTINGS, arch_of, original
from tests.unit.small_runs import commit, settled

TEXT = {"data": {"source": "python_topics", "tokenizer": "letters", "length": 16}, "codebook": {"dim": 32}}
SMALL_FILES = "4KB"
"""So that every folder has an index and several files."""


def changes(case, folder, **model):
    """Of a run on the class that a folder has."""
    own = {"model": {"arch": arch_of(case), "config": str(folder), **model}, "init": {"from": str(folder)}}
    if case.startswith("hf_llama"):
        own |= TEXT
    return own | ({} if case in ("hf_vit", "hf_llama", "hf_llama_tied") else {"noise": {}})


def started(tmp_path, case, folder, init=None, name="new", model=None, **others):
    given = changes(case, folder, **(model or {}))
    return Run(settled(tmp_path / name, **{**given, "init": {**given["init"], **(init or {})}, **others}))


def refusal(tmp_path, *args, **others):
    with pytest.raises(ConfigError) as told:
        started(tmp_path, *args, **others)
    assert not list((tmp_path / "new").rglob("*.*")), "refused before anything is written"
    assert "\n" not in str(told.value)
    return str(told.value)


def trained(run, block):
    return [name for name, p in run.plan.model(block).named_parameters() if p.requires_grad]


def first(run, block):
    """What a block starts from, and what is in no source."""
    names, origin = trained(run, block), run.manifest.init
    found = dict(read_block(run, origin, block, run.plan.shards.layers(block).start, names))
    assert found.keys() == set(names) - new_names(origin, block, names)
    return found


def by_our_names(run, network):
    stack = type(run.plan.model(0).cut_as)
    return {our_name(stack, name): value.detach() for name, value in network.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_every_block_takes_its_own_layers_of_a_folder_with_an_index(case, tmp_path):
    network = original(case, tmp_path / "source")
    network.save_pretrained(tmp_path / "source", max_shard_size=SMALL_FILES)
    (folder,) = (tmp_path / "source").glob("*.index.json")
    (tmp_path / "source" / folder.name.removesuffix(".index.json")).unlink()
    run = started(tmp_path, case, tmp_path / "source")
    wanted = by_our_names(run, network)
    for block in range(2):
        found = first(run, block)
        layers = run.plan.shards.layers(block)
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
        own = {name for name in wanted if not name.startswith("layers.") or int(name.split(".")[1]) in layers}
        assert set(found) == own
        assert all(is_added(name) for name in set(trained(run, block)) - own)
    origin = run.manifest.init
    assert origin.foreign and len(origin.files) > 3
    assert any(set(row.files) < set(origin.files) for row in origin.blocks), "a block reads its own files alone"


def test_two_experts_of_full_depth_start_from_one_network_with_their_edge_in_t(tmp_path):
    network = original("hf_wan", tmp_path / "source")
    noise = {"ranges": "explicit", "edges": [1.0, 0.875, 0.0], "shift": 5.0}
    run = started(tmp_path, "hf_wan", tmp_path / "source", init={"layers": "repeat"}, model={"depth": 6}, noise=noise)
    wanted = by_our_names(run, network)
    for block in range(2):
        for name, value in first(run, block).items():
            group, number, rest = name.split(".", 2) if name.startswith("layers.") else ("", "0", "")
            source = f"layers.{int(number) - 3 * block}.{rest}" if group else name
            assert torch.equal(value, wanted[source])
    assert run.plan.ranges.of(0) == (0.875, 1.0) and run.plan.ranges.of(1) == (0.0, 0.875)
    assert [row.layers for row in run.manifest.init.blocks] == [(0, 3), (0, 3)]


def test_a_frozen_stem_is_the_originals_and_what_was_added_to_it_is_learned(tmp_path):
    network = original("hf_vit", tmp_path / "source")
    run = started(tmp_path, "hf_vit", tmp_path / "source", init={"stem": "frozen", "head": "frozen"})
    wanted = by_our_names(run, network)
    assert set(run.frozen) == {name for name in wanted if not name.startswith("layers.")}
    assert all(torch.equal(value, wanted[name]) for name, value in run.frozen.items())
    assert {n for n in trained(run, 0) if n.startswith("stem.")} == new_names(
        run.manifest.init, 0, [n for n in trained(run, 0) if n.startswith("stem.")]
    )
    assert "stem.added.code.weight" in trained(run, 0)
    assert all(name.startswith(("layers.0.", "layers.1.")) for name in first(run, 0))


def test_a_folder_of_pickles_is_refused_by_name(tmp_path):
    original("hf_dit", tmp_path / "source")
    (tmp_path / "source/diffusion_pytorch_model.safetensors").rename(tmp_path / "source/diffusion_pytorch_model.bin")
    said = refusal(tmp_path, "hf_dit", tmp_path / "source")
    assert "has its weights in diffusion_pytorch_model.bin, a pickle, which is never read" in said


def test_an_index_of_pickles_or_of_files_that_are_gone_is_refused(tmp_path):
    original("hf_dit", tmp_path / "source").save_pretrained(tmp_path / "source", max_shard_size=SMALL_FILES)
    (tmp_path / "source/diffusion_pytorch_model.safetensors").unlink()
    parts = sorted((tmp_path / "source").glob("*-of-*.safetensors"))
    parts[1].unlink()
    assert f"names {parts[1].name}, which is not there" in refusal(tmp_path, "hf_dit", tmp_path / "source")
    index = tmp_path / "source/diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "weights.bin")
    index.write_text(json.dumps(content))
    assert "names weights.bin, a pickle by its name" in refusal(tmp_path, "hf_dit", tmp_path / "source")


def rewritten(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def test_what_is_missing_or_left_over_or_of_another_shape_or_kind_is_told_by_the_originals_names(tmp_path):
    original("hf_vit", tmp_path / "source")

    def spoil(tensors):
        tensors["classifier.weigth"] = tensors.pop("classifier.weight")
        tensors["vit.layernorm.weight"] = torch.ones(16, dtype=torch.int64)
        tensors["classifier.bias"] = torch.zeros(7)

    rewritten(tmp_path / "source", spoil)
    said = refusal(tmp_path, "hf_vit", tmp_path / "source")
    assert "1 missing: classifier.weight (nearest: classifier.weigth)" in said
    assert "1 left over: classifier.weigth (nearest: classifier.weight)" in said
    assert "1 of another shape: classifier.bias is 7, not 10" in said
    assert "1 of a type that is none of F64, F32, F16, BF16: vit.layernorm.weight is I64" in said


def test_another_width_is_refused_and_another_depth_with_its_numbers(tmp_path):
    original("hf_vit", tmp_path / "source")
    wider = {**SETTINGS["hf_vit"], "intermediate_size": 32}
    said = refusal(tmp_path, "hf_vit", tmp_path / "source", model={"config": wider})
    assert "of another shape" in said and "vit.layers.{0-2}.mlp.fc1.weight is 24x16, not 32x16" in said
    said = refusal(tmp_path, "hf_vit", tmp_path / "source", model={"depth": 5})
    assert "model.depth=5" in said and "has 3 layers (0-2)" in said
    said = refusal(tmp_path, "hf_vit", tmp_path / "source", init={"layers": "repeat"}, model={"depth": 4})
    assert "all layers of a network of a block's depth, which is 2" in said


def test_a_folder_of_another_class_or_without_weights_is_told_as_that(tmp_path):
    original("hf_vit", tmp_path / "source")
    said = refusal(tmp_path, "hf_dit", tmp_path / "source", model={"config": SETTINGS["hf_dit"]})
    assert "source, which is of ViTForImageClassification, does not fit this run: " in said
    rewritten(tmp_path / "source", lambda tensors: tensors.pop("classifier.bias"))
    said = refusal(tmp_path, "hf_vit", tmp_path / "source")
    assert "source does not fit this run: 1 missing: classifier.bias (nearest: " in said
    assert said.endswith(
        ": take weights of the network that the section model describes, or set that to what they are of"
    )
    (tmp_path / "source" / "model.safetensors").unlink()
    said = refusal(tmp_path, "hf_vit", tmp_path / "source")
    assert "has a config.json and no weights beside it" in said and said.endswith("copy the whole folder")
    (tmp_path / "source" / "config.json").unlink()
    said = refusal(tmp_path, "hf_vit", tmp_path / "source", model={"config": SETTINGS["hf_vit"]})
    assert said.endswith("diffusion_pytorch_model.safetensors): check the path")


def test_half_precision_becomes_float32_and_nan_is_refused_when_it_is_read(tmp_path):
    network = original("hf_vit", tmp_path / "source")
    network.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    run = started(tmp_path, "hf_vit", tmp_path / "source")
    found = first(run, 0)
    wanted = by_our_names(run, network)
    assert all(v.dtype == torch.float32 and torch.equal(v, wanted[n].float()) for n, v in found.items())
    rewritten(tmp_path / "source", lambda tensors: tensors["classifier.bias"].fill_(float("nan")))
    with pytest.raises(ShardError, match="its SHA-256 is"):
        first(run, 0)


def test_old_tables_and_a_readout_that_is_tied_are_not_left_over(tmp_path):
    original("hf_llama_tied", tmp_path / "source")

    def as_before(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewritten(tmp_path / "source", as_before)
    first(started(tmp_path, "hf_llama_tied", tmp_path / "source"), 1)


def test_the_settings_are_kept_in_run_json_and_not_the_place_they_were_read_from(tmp_path):
    original("hf_vit", tmp_path / "source")
    run = started(tmp_path, "hf_vit", tmp_path / "source")
    kept = run.manifest.config["model"]
    assert kept["config"]["hidden_size"] == 16 and kept["config"]["num_labels"] == 10 and kept["depth"] == 3
    assert str(tmp_path / "source") not in json.dumps(kept)


def test_a_run_of_a_class_of_another_library_is_repeated_without_a_word_on_its_depth(tmp_path):
    original("hf_dit", tmp_path / "source")
    config = {**SETTINGS["hf_dit"], "num_layers": 2}
    whole = settled(tmp_path / "whole", blocks=1, noise={}, model={"arch": "hf_dit", "config": config})
    commit(whole, blocks=(0,))

    def told(name, **changed):
        model = {"arch": "hf_dit", "config": {**config, "num_layers": 4, **changed}}
        run = settled(tmp_path / name, noise={}, model=model, init={"from": whole.url, "layers": "repeat"})
        return [line for line in Run(run).manifest.init.lines() if "something else" in line]

    assert not any("num_layers" in line for line in told("experts"))
    (line,) = told("other", norm_eps=0.5)
    assert "model.config.norm_eps=None (here 0.5)" in line and "num_layers" not in line
