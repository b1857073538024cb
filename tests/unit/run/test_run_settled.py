"""What a new run settles about its network, and runs of before, which settled nothing and stay as they were."""

from dataclasses import replace

import pytest
from safetensors.torch import save_file

from dbtrain.config import load_config
from dbtrain.models.llama import hidden_width
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import write_manifest
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never

TEXT = {
    "name": "toy",
    "blocks": 2,
    "data": {"source": "python_topics", "tokenizer": "letters", "length": 22},
    "codebook": {"source": "random", "dim": 21},
    "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    "training": {"steps": 40, "batch_size": 6, "ema": 0.0},
}
MODELS = {
    "ar_lm": {"arch": "ar_lm", "depth": 2, "dim": 20, "heads": 2, "level_dim": 6},
    "masked_lm": {"arch": "masked_lm", "depth": 2, "dim": 20, "heads": 2, "level_dim": 6},
    "recurrent": {"arch": "recurrent", "depth": 2, "dim": 20, "heads": 2, "level_dim": 6},
}
# hashes of the architecture, as the version before widths were rounded made them
BEFORE = {"ar_lm": "8293300335a1d661", "masked_lm": "f1258f1fb8fdd977", "recurrent": "c14fe1f94f8cc949"}
EVERY = pytest.mark.parametrize("arch", MODELS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def begin(tmp_path, cache):
    def make(arch, name="toy", **changes):
        base = {**TEXT, "model": MODELS[arch], "data": TEXT["data"] | {"cache": str(cache)}, **changes}
        if arch == "masked_lm":
            base["noise"] = {"ranges": "alpha"}
        config = load_config(
            None, [f"out={tmp_path}", f"name={name}", f"blocks={1 if arch == 'recurrent' else 2}"], base=base
        )
        run = Run(Store(config.run_url))
        run.store.makedirs()
        return run, config, prepare(config, run, never)

    return make


def widths(run_plan):
    """Hidden widths of all SwiGLUs of block 0."""
    named = run_plan.model(0, "meta").named_parameters()
    return {parameter.shape[1] for name, parameter in named if name.endswith("mlp.out.weight")}


def as_of_before(run):
    """Write run.json as the version before had it, without what is settled."""
    bare = Run(run.store)
    manifest = replace(bare.manifest, settled={})
    manifest = replace(manifest, architecture_hash=replace(bare.plan, settled={}).architecture_hash)
    write_manifest(run.store, manifest)
    return Run(run.store)


def test_widths_are_rounded_up():
    assert [hidden_width(dim, 8 / 3, 64) for dim in (20, 64, 384, 1024, 4096)] == [64, 192, 1024, 2752, 10944]
    assert hidden_width(4096, 8 / 3, 1) == 10923


@EVERY
def test_a_new_run_has_widths_of_64s_and_keeps_them(begin, arch):
    run, _, made = begin(arch)
    assert widths(made) == {64}
    assert b"hidden_multiple" in run.store.read("run.json")
    read = Run(run.store).plan
    assert widths(read) == {64} and read.architecture_hash == made.architecture_hash


@EVERY
def test_a_run_of_before_is_built_and_named_as_it_was(begin, arch):
    old = as_of_before(begin(arch)[0])
    assert b"settled" not in old.store.read("run.json")
    assert widths(old.plan) == {53}
    assert old.manifest.architecture_hash == BEFORE[arch]


def test_a_run_of_before_goes_on_under_the_same_configuration(begin):
    run, config, _ = begin("ar_lm")
    again = prepare(config, as_of_before(run), never)
    assert widths(again) == {53}
    assert again.architecture_hash == BEFORE["ar_lm"]


def test_a_new_run_takes_the_widths_of_the_weights_that_it_starts_from(begin, tmp_path):
    old = as_of_before(begin("masked_lm")[0]).plan
    weights = {name: p.detach().contiguous() for name, p in old.model(0).named_parameters()}
    weights |= {
        name.replace("layers.0", "layers.1"): p.clone() for name, p in weights.items() if name.startswith("layers.0")
    }
    save_file(weights, tmp_path / "old.safetensors")
    run, _, made = begin("masked_lm", "new", init={"from": str(tmp_path / "old.safetensors")})
    assert widths(made) == {53} and widths(Run(run.store).plan) == {53}
