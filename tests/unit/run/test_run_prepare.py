from dataclasses import replace

import pytest
import torch

from dbtrain.config import parse_config
from dbtrain.errors import ConfigError, ShardError
from dbtrain.experiments.baseline import end_to_end
from dbtrain.method.codebook import make_codebook
from dbtrain.method.levels import LogNormal, read_distribution
from dbtrain.method.ranges import equal_shares
from dbtrain.method.split import split_evenly
from dbtrain.run.make_plan import design
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never


def test_uniform_ranges_have_equal_log_width(make_config, digits):
    run_plan = design(make_config(), digits, never)
    assert run_plan.ranges.edges == pytest.approx((10.0, 10 ** (1 / 3), 10 ** (-1 / 3), 0.1))
    assert run_plan.split == split_evenly(6, 3)


def test_paper_ranges_are_those_of_the_paper(make_config, digits):
    config = make_config("noise.ranges=paper", "noise.sigma_min=0.002", "noise.sigma_max=80")
    run_plan = design(config, digits, never)
    assert [round(edge, 4) for edge in run_plan.ranges.edges] == [80.0, 0.505, 0.1796, 0.002]
    assert run_plan.ranges == equal_shares(LogNormal(-1.2, 1.2, 0.002, 80.0), 3)


def test_explicit_ranges_are_taken_as_given_and_set_the_full_range(make_config, digits):
    config = make_config("noise.ranges=explicit", "noise.edges=[7,2,0.5,0.25]")
    run_plan = design(config, digits, never)
    assert run_plan.ranges.edges == (7.0, 2.0, 0.5, 0.25)
    distribution = read_distribution(run_plan.distribution)
    assert (distribution.low, distribution.high) == (0.25, 7.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["blocks=7"], "blocks=7 cannot share 6 layers"),
        (["layers_per_block=[3,3]"], "layers_per_block has 2 entries, and blocks=3.*layers_per_block=null"),
        (["layers_per_block=[1,2,2]"], "add up to model.depth=6"),
        (["noise.ranges=explicit", "noise.edges=[7,1]"], "noise.edges has 2 values; blocks=3 needs 4"),
        (["noise.ranges=explicit", "noise.edges=[1,2,3,4]"], "do not tile"),
        (["noise.sigma_min=20"], "sigma_min=20"),
        (["codebook.dim=9"], "no room for 10 orthogonal codes"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(make_config, tmp_path, overrides, message):
    run = Store(tmp_path / "toy")
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(*overrides), Run(run), never)
    assert not run.exists("run.json") and not run.exists("codebook.safetensors")


def test_a_calibrated_range_is_the_one_that_was_measured(make_config, digits):
    seen = []

    def measured(config, data, codebook):
        seen.append(codebook)
        return {"kind": "table", "levels": [0.5, 1.0, 8.0], "shares": [0.0, 0.5, 1.0]}

    run_plan = design(make_config("blocks=2", "noise.ranges=calibrated"), digits, measured)
    assert run_plan.ranges.edges == pytest.approx((8.0, 1.0, 0.5))
    assert torch.equal(seen[0], make_codebook("orthogonal", 10, 16, 0))


def test_end_to_end_is_one_block_without_noise(make_config, digits):
    run_plan = design(make_config("method=end_to_end", "blocks=1"), digits, never)
    assert run_plan.distribution == {"kind": "none"} and run_plan.split.layers(0) == range(6)


def test_the_manifest_says_what_every_worker_needs_exactly(make_run, digits):
    config, run = make_run()
    manifest = read_manifest(run)
    settled, designed = Run(run).plan, design(config, digits, never)
    assert settled.ranges == designed.ranges and settled.split == designed.split
    assert settled.config == config and settled.shape == designed.shape
    assert torch.equal(settled.codebook, designed.codebook)
    for block in range(3):
        identity = manifest.identity(block)
        assert identity.layers == (2 * block, 2 * block + 2)
        assert tuple(map(float.fromhex, identity.levels)) == designed.ranges.of(block)
    assert manifest.versions["torch"] == torch.__version__


def test_every_worker_builds_the_same_block_and_leaves_the_generator_alone(make_run):
    _, run = make_run()

    def weights(block):
        model = Run(run).plan.model(block)
        return torch.cat([p.flatten() for _, p in sorted(model.named_parameters())])

    torch.manual_seed(1)
    first, state = weights(1), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, weights(1))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, weights(2))


def test_settling_again_changes_nothing_and_calibrates_nothing(make_run):
    config, run = make_run()
    before = {name: run.read(name) for name in run.list()}
    run_plan = prepare(config, Run(run), never)
    assert {name: run.read(name) for name in run.list()} == before
    assert run_plan.ranges.edges[1].hex() == read_manifest(run).plan[0].levels[0]


def test_where_a_run_continues_may_change(make_run, make_config):
    _, run = make_run()
    moved = make_config("cluster.cpus_per_worker=0.5", "training.micro_batch=4", "training.zero_stage=1")
    assert prepare(moved, Run(run), never).config == moved


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.patch=3"], "patch"),
        (["training.batch_size=9", "cluster.workers=2"], "batch_size=9"),
        (["cluster.blocks.2.micro_batch=3"], "micro_batch=3"),
        (["training.augmentation.flip=true"], "augmentation"),
    ],
)
def test_what_no_worker_could_train_leaves_the_name_to_what_is_mended(
    make_run, make_config, monkeypatch, digits, overrides, words
):
    config = make_config(*overrides)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=words):
        if words == "augmentation":
            patch.setattr("dbtrain.run.prepare.load_data", lambda _: replace(digits, train=range(9)))
        prepare(config, Run(Store(config.run_url)), never)
    assert not Store(config.run_url).exists("run.json")
    make_run()


def test_a_run_is_not_continued_with_a_batch_that_cannot_be_cut(make_run, make_config):
    _, run = make_run()
    with pytest.raises(ConfigError, match="micro_batch=3"):
        prepare(make_config("training.micro_batch=3"), Run(run), never)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=7", "seed: 0 in run.json, 7 now; choose another name"),
        ("training.optimizer.lr=0.5", "training.optimizer.lr: 0.001 in run.json, 0.5 now;"),
        ("model.depth=7", "model.depth: 6 in run.json, 7 now;"),
        ("blocks=2", "blocks: 3 in run.json, 2 now;"),
        ("data={source: text, path: corpus}", "configuration: data.source: digits in run.json, text now; "),
        ("data={source: text, path: corpus}", "data.tokenizer: absent in run.json, letters now;"),
    ],
)
def test_a_run_of_another_configuration_is_refused_with_what_differs(make_run, make_config, override, words):
    _, run = make_run()
    before = run.read("run.json")
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(override), Run(run), never)
    assert words in str(caught.value) and run.url in str(caught.value)
    assert run.read("run.json") == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["blocks=99"], "blocks=99 cannot share 6 layers"),
        (["layers_per_block=[3,3]", "seed=1"], "layers_per_block has 2 entries, and blocks=3"),
        (["noise.ranges=explicit", "noise.edges=[7,1]"], "noise.edges has 2 values"),
        (["method=forward_forward", "model.arch=dit"], "method=forward_forward hides the target"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_configuration_is_told_before_what_differs(make_run, make_config, overrides, words):
    make_run()
    config = make_config(*overrides)
    with pytest.raises(ConfigError, match=words) as caught:
        prepare(config, Run(Store(config.run_url)), never)
    assert "another configuration" not in str(caught.value)


def test_of_very_many_keys_that_differ_some_are_told(make_run, make_config):
    _, run = make_run()
    changes = [f"training.optimizer.{change}" for change in ("lr=1", "eps=1", "clip=3", "warmup=4", "final_lr=0.5")]
    with pytest.raises(ConfigError, match=r"clip: 1.0 in run.json, 3.0 now; choose"):
        prepare(make_config(*changes), Run(run), never)
    with pytest.raises(ConfigError, match="final_lr: 0.0 in run.json, 0.5 now; and 1 more; choose"):
        prepare(make_config(*changes, "training.steps=9"), Run(run), never)


def test_a_codebook_that_was_tampered_with_is_refused(make_run):
    config, run = make_run()
    data = bytearray(run.read("codebook.safetensors"))
    data[-1] ^= 1
    run.write("codebook.safetensors", bytes(data))
    with pytest.raises(ShardError, match="codebook"):
        prepare(config, Run(run), never)


def test_the_codebook_of_another_run_and_a_missing_one_are_refused(make_run):
    config, run = make_run()
    _, other = make_run("name=other", "seed=1")
    run.write("codebook.safetensors", other.read("codebook.safetensors"))
    with pytest.raises(ShardError, match="codebook"):
        prepare(config, Run(run), never)
    run.remove("codebook.safetensors")
    with pytest.raises(ShardError, match="codebook"):
        prepare(config, Run(run), never)


DIT = ["model.arch=dit", "model.patch=2", "noise.sigma_min=0.002", "noise.sigma_max=80"]


def without_ranges(make_config, *overrides):
    """The small configuration as a DiT that says nothing of policy and weight."""
    content = make_config(*DIT, *overrides).model_dump(mode="json")
    content["noise"] = {"sigma_min": 0.002, "sigma_max": 80.0}
    return parse_config(content, "test")


def test_a_dit_takes_the_papers_ranges_and_weight_unless_told_otherwise(make_config, digits):
    run_plan = design(without_ranges(make_config), digits, never)
    assert [round(edge, 4) for edge in run_plan.ranges.edges] == [80.0, 0.505, 0.1796, 0.002]
    noise = run_plan.noise()
    assert (noise.weighting, noise.sigma_data, run_plan.codebook) == ("edm", 0.5, None)
    assert design(make_config(*DIT), digits, never).distribution["kind"] == "loguniform"
    assert make_config(*DIT, "noise.weighting=none").noise.weighting == "none"


@pytest.mark.parametrize("policy", ["calibrated", "equal_information"])
def test_what_measures_a_codebook_is_refused_without_one(make_config, digits, policy):
    with pytest.raises(ConfigError, match=rf"noise.ranges={policy} measures a codebook, and model.arch=dit has none"):
        design(make_config(*DIT, f"noise.ranges={policy}"), digits, never)


@pytest.mark.parametrize("policy", [["noise.ranges=paper"], ["noise.ranges=explicit", "noise.edges=[9,2,1,0.5]"]])
def test_end_to_end_of_a_dit_denoises_the_same_range_with_one_block_for_the_same_flops(make_config, digits, policy):
    config = make_config(*DIT, *policy, "training.steps=1000")
    whole_config = end_to_end(config)
    blocks, whole = design(config, digits, never), design(whole_config, digits, never)
    assert whole.ranges.edges == (blocks.ranges.edges[0], blocks.ranges.edges[-1])
    assert whole.distribution == blocks.distribution and whole_config.blocks == 1
    # three private stems and heads against one
    assert 1000 < whole_config.training.steps < 2000
