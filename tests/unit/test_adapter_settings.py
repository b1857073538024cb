"""Settings of classes of other libraries: read from their files, completed by the data, and refused in one line."""

import json
import sys

import pytest

from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.run.plan import load_data
from dbtrain.run.prepare import plan_run
from tests.unit.models.originals import DIT, LLAMA, VIT, WAN, original

BASE = {"name": "run", "blocks": 2, "data": {"source": "digits"}, "codebook": {"dim": 16}}
RANGE = {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0}
TEXT = {"data": {"source": "python_topics", "tokenizer": "letters", "length": 16}, "codebook": {"dim": 32}}
DEPTH = {"hf_vit": "num_hidden_layers", "hf_llama": "num_hidden_layers", "hf_dit": "num_layers", "hf_wan": "num_layers"}
SETTINGS = {"hf_vit": VIT, "hf_llama": LLAMA, "hf_dit": DIT, "hf_wan": WAN}


def configured(arch, config, overrides=(), **model):
    base = {**BASE, **(TEXT if arch == "hf_llama" else {}), "model": {"arch": arch, "config": config, **model}}
    base |= {"noise": RANGE} if arch in ("hf_vit", "hf_llama") else {}
    return load_config(None, list(overrides), base=base)


def planned(*given, **model):
    chosen = configured(*given, **model)
    return plan_run(chosen, load_data(chosen), None)


def refused(arch, config, overrides=()):
    with pytest.raises(ConfigError) as caught:
        planned(arch, config, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settings(arch, **changes):
    return {**SETTINGS[arch], DEPTH[arch]: 2, **changes}


@pytest.mark.parametrize("arch", SETTINGS)
def test_the_keys_of_the_class_the_file_and_the_folder_are_the_same_network(arch, tmp_path):
    written = configured(arch, settings(arch))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**settings(arch), "_name_or_path": "/home/somebody/secret"}))
    kept = written.model.model_dump()
    assert configured(arch, str(file)).model.model_dump() == configured(arch, str(tmp_path)).model.model_dump() == kept
    assert written.model.depth == 2 and "secret" not in json.dumps(kept)
    again = load_config(None, base=written.model_dump(mode="json"))
    assert again.content_hash() == written.content_hash()


def test_the_depth_may_be_another_and_overrides_reach_the_settings():
    run_plan = planned("hf_vit", settings("hf_vit"), ["model.config.hidden_size=24"], depth=4)
    assert run_plan.config.model.config["num_hidden_layers"] == 4 == run_plan.config.model.depth
    assert run_plan.model(1).get_parameter("stem.vit.embeddings.cls_token").shape[-1] == 24


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("hf_vit", {"hiden_size": 3}, "hiden_size is no key of ViTForImageClassification: did you mean hidden_size?"),
        ("hf_vit", {"hidden_act": "nope"}, "model.config is not for ViTForImageClassification: KeyError: 'nope'"),
        ("hf_vit", {"num_channels": 3}, "model.config.num_channels=3, and the data has images of 1x8x8 and 10 classes"),
        ("hf_vit", {"patch_size": 16}, "fails on a batch of the data (RuntimeError: Calculated padded input size"),
        ("hf_vit", {"num_hidden_layers": 0}, "model.depth=0: it must be greater than or equal to 1"),
        ("hf_vit", {"model_type": "bert"}, "is of another class than ViTForImageClassification"),
        (
            "hf_dit",
            {"_class_name": "PixArtTransformer2DModel"},
            "is of PixArtTransformer2DModel, not of DiTTransformer",
        ),
        (
            "hf_dit",
            {"out_channels": 3},
            "model.config.out_channels=3 is neither 1, the channels of the data, nor twice",
        ),
        ("hf_dit", {"patch_size": 3}, "model.config.patch_size=3 does not divide the 8x8 image"),
        ("hf_dit", {"scheduler": {"beta_schedule": "cosine"}}, "beta_schedule=cosine is none of linear, scaled_linear"),
        ("hf_dit", {"scheduler": {"beta_end": 2}}, "beta_end=2 and num_train_timesteps=1000 must be betas that rise"),
        ("hf_dit", {"scheduler": 7}, "model.config.scheduler=7 must be keys of diffusers' DDPMScheduler"),
        ("hf_wan", {"image_dim": 8}, "model.config.image_dim=8 is of a network that reads an image beside the text"),
        ("hf_wan", {"patch_size": [1, 3, 3]}, "model.config.patch_size=[1, 3, 3] does not divide one frame of 8x8"),
        ("hf_wan", {"patch_size": 2}, "model.config.patch_size=[2] does not divide one frame of 8x8"),
        ("hf_wan", {"rope_max_seq_len": 2}, "a network of these settings fails on a batch of the data"),
        ("hf_llama", {"vocab_size": 20}, "model.config.vocab_size=20 is below the 27 tokens of the data"),
        ("hf_llama", {"num_key_value_heads": 3}, "a network of these settings fails on a batch of the data"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_value(arch, changes, message):
    assert message in refused(arch, settings(arch, **changes))


def test_the_file_of_another_class_is_refused_by_that_class(tmp_path):
    vit, wan = tmp_path / "vit", tmp_path / "wan"
    original("hf_vit", vit), original("hf_wan", wan)
    for arch in ("hf_wan", "hf_dit"):
        assert "config.json is of ViTForImageClassification, not of " in refused(arch, str(vit))
    for arch in ("hf_vit", "hf_llama"):
        assert "config.json is of another class than " in refused(arch, str(wan))
    assert "model.config.hidden_size=24: model.config is " in refused(
        "hf_vit", str(vit), ["model.config.hidden_size=24"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds list, no object of keys"),
        (None, "there is no file"),
        (5, "model.config=5 must be"),
    ],
)
def test_a_file_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "config.json"
    if isinstance(content, str):
        path.write_text(content)
    assert message in refused("hf_vit", str(path) if content != 5 else 5)


def test_a_vocabulary_that_is_larger_than_the_datas_has_outputs_that_are_not_read():
    model = planned("hf_llama", settings("hf_llama", vocab_size=40)).model(0)
    assert model.get_parameter("head.lm_head.weight").shape[0] == 40 and model.cut_as.vocabulary == 27


def test_a_library_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "needs the package diffusers, which cannot be imported" in refused("hf_dit", settings("hf_dit"))
    assert "install dbtrain[diffusers]" in refused("hf_wan", settings("hf_wan"))


def test_other_keys_of_a_saved_file_are_taken_as_the_library_wrote_them(tmp_path):
    saved = {**settings("hf_llama"), "transformers_version": "4.40.0", "rope_theta": 500000.0, "some_old_key": 1}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    run_plan = planned("hf_llama", str(tmp_path))
    assert run_plan.model(0).cut_as._made().rope_parameters["rope_theta"] == 500000.0
