from pathlib import Path

import pytest
import torch

from dbtrain.config import EvaluationConfig, load_config, parse_config
from dbtrain.errors import ConfigError, ShardError
from dbtrain.evaluation.report import evaluate_run
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.experiments.ablate import Grid, Measured, evaluation, grid, summary
from dbtrain.experiments.baseline import KINDS, baseline, reshaped, training_flops
from dbtrain.method.split import global_name
from dbtrain.models.registry import ARCHITECTURES
from dbtrain.models.vit import ViT
from dbtrain.run.branch import branch_plan
from dbtrain.run.cost import estimate, recomputed
from dbtrain.run.make_plan import design
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store
from dbtrain.training.upstream import load_upstream
from tests.conftest import ROOT
from tests.unit.conftest import SMALL, never
from tests.unit.small_runs import BASE, commit, settled

CONFIGS = ROOT / "configs"

THREE = ("model.depth=3", "training.steps=100")
SHARDS = {"end_to_end": 1, "checkpointing": 1, "joint": 1, "forward_forward": 1, "greedy": 3, "ensemble": 3}


def test_every_kind_is_known_here():
    assert set(SHARDS) == set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "checkpointing"])
def test_a_baseline_takes_the_flops_of_the_blocks(make_config, digits, kind):
    config = make_config(*THREE)
    made = baseline(config, kind)
    assert made.flops == pytest.approx(made.budget, rel=0.01)
    assert made.flops == training_flops(design(made.config, digits, never))
    assert made.config.name == f"toy-{kind.replace('_', '-')}" and made.config.model == config.model


def test_the_warm_up_of_a_baseline_is_the_same_share_of_its_steps():
    config = load_config(CONFIGS / "recurrent_tiny.yaml")
    training = baseline(config).config.training
    assert training.steps < 0.5 * config.training.steps  # a step through all iterations costs more
    share = config.training.optimizer.warmup / config.training.steps
    assert training.optimizer.warmup / training.steps == pytest.approx(share, rel=0.05)


OWN = "training.blocks={0: {steps: 151, batch_size: 5}, 2: {steps: 41, lr: 0.5, ema: 0.9}}"
"""Beside 100 steps of 8 samples."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "checkpointing"])
def test_a_baseline_takes_the_flops_of_blocks_of_different_lengths_and_batches(make_config, digits, kind):
    config = make_config(*THREE, OWN)
    made, isolated = baseline(config, kind), design(config, digits, never)
    samples = (151 * 5, 100 * 8, 41 * 8)
    budget = sum(n * estimate(isolated, block, 2, 1).flops / 2 for block, n in enumerate(samples))
    assert made.budget == pytest.approx(budget, rel=1e-12) == training_flops(isolated)
    assert made.flops == training_flops(design(made.config, digits, never))
    # equal but for the rounding to whole steps
    shards = design(made.config, digits, never)
    own = [made.config.training.of_block(shard) for shard in range(shards.shards.blocks)]
    a_step = sum(t.batch_size * estimate(shards, shard, 2, 1).flops / 2 for shard, t in enumerate(own))
    assert abs(made.flops - budget) <= a_step / 2 * (1 + 1e-9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "checkpointing"])
def test_a_baseline_takes_the_flops_of_the_branch_too(make_config, digits, kind):
    """Those of one block-sized network, for as many steps as it is trained."""
    plain, branched = make_config(*THREE), make_config(*THREE, "init.branch.steps=40")
    without, made = baseline(plain, kind), baseline(branched, kind)
    branch = branch_plan(design(branched, digits, never))
    own = 40 * 8 * estimate(branch, 0, 2, 1).flops / 2
    assert made.budget == pytest.approx(without.budget + own, rel=1e-12)
    assert made.budget == pytest.approx(training_flops(design(branched, digits, never)), rel=1e-12)
    assert made.flops == training_flops(design(made.config, digits, never)) == pytest.approx(made.budget, rel=0.01)
    # an ensemble of networks of a block's size starts from a branch as the blocks do
    assert bool(made.config.init.branch) == (kind == "ensemble") == (not made.unlike)


def test_the_blocks_of_a_baseline_keep_the_ratio_of_their_lengths_and_say_so(make_config):
    made = baseline(make_config(*THREE, OWN), "greedy")
    lengths = [made.config.training.of_block(block).steps for block in range(3)]
    ratio = made.config.training.steps / 100
    assert ratio != 1 and lengths == pytest.approx([151 * ratio, 100 * ratio, 41 * ratio], abs=1)
    assert [made.config.training.of_block(block).batch_size for block in range(3)] == [5, 8, 8]
    assert f"{lengths[0]}, {lengths[1]}, {lengths[2]} steps" in made.describe()


def test_the_concatenated_stream_has_the_single_streams_baseline():
    single, concat = (
        baseline(load_config(CONFIGS / "ar_tiny.yaml", [f"model.stream={stream}"])) for stream in ("single", "concat")
    )
    per_step = [made.flops / made.config.training.steps for made in (single, concat)]
    assert per_step[0] == pytest.approx(per_step[1])
    assert concat.config.training.steps > 1.5 * single.config.training.steps


def test_activation_checkpointing_is_the_same_run_with_less_memory_and_says_what_it_computes_again(make_config, digits):
    config = make_config(*THREE)
    plain, less = baseline(config), baseline(config, "checkpointing")
    assert less.config.training.steps == plain.config.training.steps and less.flops == plain.flops
    blueprints = [design(b.config, digits, never) for b in (plain, less)]
    kept, inputs = (estimate(b, 0, 16, 1).activations for b in blueprints)
    assert inputs < 0.5 * kept
    # the layers' forward pass again: a third of what their forward and backward take, and not the stem's and head's
    again = recomputed(blueprints[1], 0, 16)
    assert 0.25 * estimate(blueprints[0], 0, 16, 1).flops < again < estimate(blueprints[0], 0, 16, 1).flops / 3
    assert plain.again == 0 and "again, not counted" in less.describe()
    # it does not determine the weights, so a run may go on with it
    name = {"name": plain.config.name}
    assert less.config.model_copy(update=name).content_hash() == plain.config.content_hash()


def test_what_a_kind_cannot_be_is_refused(make_config):
    with pytest.raises(ConfigError, match="'slow' is no baseline: there are end_to_end, checkpointing"):
        baseline(make_config(), "slow")


def trained(config):
    """A settled run whose shards are committed at their last step with weights of their own."""
    run = Store(config.run_url)
    run.makedirs()
    run_plan = prepare(config, Run(run), never)
    manifest = read_manifest(run)
    for shard in range(run_plan.shards.blocks):
        torch.manual_seed(shard)
        model = run_plan.objective(shard).get_submodule("model")
        weights = {
            global_name(shard, name): parameter.detach() + 0.05 * torch.randn(parameter.shape)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        checkpoints = Checkpoints(run.child("blocks", f"{shard:02d}"), manifest.identity(shard))
        checkpoints.commit(config.training.steps, {"model": weights}, loss=1.0, attempt=1, fence=lambda: None)
    return run, run_plan


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_is_stored_merged_verified_and_evaluated_like_any_run(make_config, kind):
    run, run_plan = trained(reshaped(make_config("training.steps=2"), kind))
    manifest = read_manifest(run)
    assert manifest.blocks == SHARDS[kind] and bool(manifest.slices) == (kind in ("joint", "forward_forward"))
    again = Run(run).plan
    assert (again.split, again.ranges) == (run_plan.split, run_plan.ranges)
    assert again.split.blocks == (1 if KINDS[kind] == "end_to_end" else 3)
    result, _ = merge_and_verify(Run(run))
    assert len(result.blocks) == SHARDS[kind]
    _, scores = evaluate_run(Run(run))
    assert {f"after_{b}" for b in range(again.split.blocks)} <= set(scores["test"])
    assert ("shuffled" in scores["test"]) == ("scrambled" in scores["test"]) == (kind == "joint")


def test_the_levels_of_joint_training_are_those_of_the_isolated_blocks(make_config, digits):
    config = make_config()
    alone, joint = (design(c, digits, never) for c in (config, reshaped(config, "joint")))
    assert joint.ranges == alone.ranges and joint.split == alone.split and joint.shards.bounds == (0, 6)
    assert joint.levels(0) == (alone.ranges.edges[-1], alone.ranges.edges[0])


def test_isolated_blocks_are_evaluated_with_controls(make_config):
    run, _ = trained(make_config())
    merge_and_verify(Run(run))
    _, scores = evaluate_run(Run(run))
    assert {"chain", "mean", "first", "shuffled", "scrambled"} <= set(scores["test"])
    _, without = evaluate_run(Run(run), section=EvaluationConfig(controls=False))
    assert not {"shuffled", "scrambled"} & set(without["test"])


def test_a_greedy_block_takes_the_weights_of_those_before_it_and_waits_until_they_are_done(make_config):
    config = reshaped(make_config("training.steps=2"), "greedy")
    run, run_plan = trained(config)
    manifest = read_manifest(run)
    model = run_plan.objective(2).get_submodule("model")
    load_upstream(model, Run(run), range(2))
    for shard in range(2):
        identity = manifest.identity(shard)
        saved = Checkpoints(run.child("blocks", f"{shard:02d}"), identity).newest().parts["model"]
        for layer in (2 * shard, 2 * shard + 1):
            name = f"layers.{layer}.mlp.0.weight"
            assert torch.equal(model.get_parameter(name), saved[name])
    assert torch.equal(
        model.stem.patches.weight,
        Checkpoints(run.child("blocks", "00"), manifest.identity(0))
        .newest()
        .parts["model"]["blocks.0.stem.patches.weight"],
    )
    run.remove("blocks/01")
    with pytest.raises(ShardError, match="block 1 .* is at step 0 of"):
        load_upstream(model, Run(run), range(2))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("name: g\nmodel: {arch: vit, depth: 6, dim: 16, heads: 2, patch: 4}\ndata: {source: digits}\n")
    return str(path)


def test_the_grid_has_each_setting_once_and_names_that_stay(file):
    axes = Grid((1, 3, 4), ("paper",), ("even", "front", "back"), (0, 1), ("end_to_end", "joint"))
    variants = grid(file, ("training.steps=5",), axes)
    runs = [v.run.removeprefix("runs/") for v in variants if v.seed == 1]
    # of one block there is one partition; of 6 layers, 4 blocks get (2, 2, 1, 1) evenly and from the front
    assert runs == [
        "g-b1-s1-end-to-end", "g-b1-s1-joint", "g-b3-s1-joint", "g-b4-s1-joint",
        "g-b1-paper-s1", "g-b3-paper-s1", "g-b3-paper-front-s1", "g-b3-paper-back-s1",
        "g-b4-paper-s1", "g-b4-paper-back-s1",
    ]  # fmt: skip
    by_run = {v.run.removeprefix("runs/"): v for v in variants}
    assert "layers_per_block=[1,2,3]" in by_run["g-b3-paper-back-s0"].overrides
    assert by_run["g-b3-s0-joint"].command == ("baseline", "--kind", "joint") and by_run["g-b3-s0-joint"].blocks == 3
    assert len(variants) == 20


def test_grids_of_other_block_counts_share_no_baseline(file):
    axes = [Grid(counts, ("paper",), ("even",), (0,), ("end_to_end",)) for counts in ((2, 3), (3,))]
    baselines = [{v.run for v in grid(file, (), a) if v.command[0] == "baseline"} for a in axes]
    assert len(baselines[0]) == 1 and not baselines[0] & baselines[1]


def test_a_grid_shares_layers_evenly_whatever_its_file_says_of_one_block_count(file, tmp_path):
    odd = tmp_path / "odd.yaml"
    odd.write_text(f"blocks: 3\nlayers_per_block: [3, 2, 1]\n{Path(file).read_text()}")
    for variant in grid(str(odd), (), Grid((2, 3), ("paper",), ("even",), (0,), ("joint",))):
        assert load_config(str(odd), variant.overrides).layers_per_block is None
    with pytest.raises(ConfigError, match="--partitions"):
        grid(file, ("layers_per_block=[3,2,1]",), Grid((3,), ("paper",), ("even",), (0,), ()))


def test_a_grid_leaves_out_the_exceptions_that_its_file_makes_for_blocks(file, tmp_path):
    odd = tmp_path / "odd.yaml"
    odd.write_text(f"blocks: 3\n{Path(file).read_text()}cluster: {{blocks: {{2: {{micro_batch: 8}}}}}}\n")
    axes = Grid((1, 2), ("paper",), ("even",), (0,), ("end_to_end",))
    for variant in grid(str(odd), ("training.blocks.0.lr=0.5",), axes):
        config = load_config(str(odd), variant.overrides)
        assert not config.cluster.blocks and config.training.of_block(0).optimizer.lr == 0.5


def test_a_run_of_the_grid_is_evaluated_as_this_command_says(file):
    [variant] = grid(file, ("evaluation.steps=7",), Grid((3,), ("paper",), ("even",), (0,), ()))
    told = load_config(None, evaluation(file, variant), base={"evaluation": {"steps": 9, "texts": 3}, **SMALL})
    assert told.evaluation == load_config(file, ["evaluation.steps=7"]).evaluation


def test_a_partition_or_kind_that_there_is_not_is_refused(file):
    with pytest.raises(ConfigError, match="partition 'middle' is none of even, front, back"):
        grid(file, (), Grid((3,), ("paper",), ("middle",), (0,), ("end_to_end",)))
    with pytest.raises(ConfigError, match="'sum' is no baseline"):
        grid(file, (), Grid((3,), ("paper",), ("even",), (0,), ("sum",)))


def test_the_summary_keeps_partitions_apart_and_spreads_over_seeds(file):
    axes = Grid((3,), ("paper",), ("even", "front"), (0, 1), ("end_to_end",))
    measured = [
        Measured(v, {"test": {"mean": 0.5 + 0.1 * v.seed + 0.2 * (v.partition == "front")}}, 1, 2.0, 3.0)
        for v in grid(file, (), axes)
    ]
    rows = {(row["blocks"], row["ranges"], row["partition"]): row for row in summary(measured)}
    assert set(rows) == {(1, "end_to_end", "even"), (3, "paper", "even"), (3, "paper", "front")}
    assert rows[3, "paper", "front"]["scores"]["test"]["mean"]["mean"] == pytest.approx(0.75)
    assert rows[3, "paper", "even"]["scores"]["test"]["mean"]["std"] == pytest.approx(0.1 / 2**0.5)


def test_a_baseline_with_one_optimizer_has_no_exceptions_of_blocks(make_config):
    config = make_config(*THREE, "training.blocks.2.lr=0.5")
    rates = {kind: reshaped(config, kind).training.of_block(2).optimizer.lr for kind in KINDS}
    assert {kind for kind, rate in rates.items() if rate == 0.5} == {"ensemble", "greedy"}
    with pytest.raises(ConfigError, match="one optimizer for all blocks"):
        make_config(*THREE, "training.blocks.2.lr=0.5", "method=joint")


def test_a_baseline_starts_as_the_blocks_do_where_it_can_and_says_where_it_cannot(tmp_path, make_config):
    source = settled(tmp_path / "source")
    commit(source)
    base = {**BASE, "init": {"from": source.url}}
    sliced = load_config(None, [f"out={tmp_path}"], base=base)
    kept = baseline(sliced)
    assert kept.config.init == sliced.init and not kept.unlike and "random" not in kept.describe()
    for kind in ("greedy", "forward_forward"):
        made = baseline(sliced, kind)
        assert made.config.init.source is None and "starts from random weights, unlike the blocks" in made.describe()
    shard = f"{source.url}/blocks/00/step_00000002/model.safetensors"
    repeated = load_config(
        None,
        [f"out={tmp_path}", "model.depth=4", f"init.from={shard}", "init.layers=repeat", "init.stem=frozen"],
        base=BASE,
    )
    made = baseline(repeated)
    assert made.config.init.source is None and made.unlike.startswith("they start from a network of one block's layers")
    assert made.config == parse_config(made.config.model_dump(mode="json"), "the baseline")


def test_a_baseline_of_another_network_starts_from_random_weights_and_says_why(tmp_path, monkeypatch):
    source = settled(tmp_path / "source")
    commit(source)
    config = load_config(None, [f"out={tmp_path}", f"init.from={source.url}"], base=BASE)

    class Wider(ViT):
        @classmethod
        def baseline(cls, **arguments):
            return cls(**{**arguments, "dim": 24})

    monkeypatch.setitem(ARCHITECTURES, "vit", Wider)
    made = baseline(config)
    assert made.config.init.source is None and "of another shape" in made.describe()
