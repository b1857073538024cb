"""The branch of a run: one network of a block's size over all levels, from which every block starts."""

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.split import global_name
from dbtrain.run.branch import awaits_branch, branch_plan, start_from_branch
from dbtrain.run.initial_weights import read_block
from dbtrain.run.make_plan import design
from dbtrain.run.prepare import prepare, prepare_branch
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from tests.unit.conftest import never

BRANCHED = ["init.branch.steps=30", "training.steps=120", "training.optimizer.warmup=40"]


def test_a_branch_has_a_blocks_layers_and_the_whole_range(make_config, digits):
    run_plan = design(make_config(*BRANCHED, "noise.ranges=explicit", "noise.edges=[7,2,0.5,0.25]"), digits, never)
    branch = branch_plan(run_plan)
    assert branch.split.bounds == (0, 2) and branch.config.model.depth == 2
    assert branch.ranges.edges == (7.0, 0.25) and branch.config.noise.edges == (7.0, 0.25)
    assert branch.codebook is run_plan.codebook and branch.distribution == run_plan.distribution
    block, whole = (dict(plan.model(0).named_parameters()) for plan in (run_plan, branch))
    assert {n: p.shape for n, p in block.items()} == {n: p.shape for n, p in whole.items()}


def test_its_schedule_is_a_blocks_over_its_own_steps(make_config, digits):
    config = make_config(*BRANCHED, "training.blocks={0: {steps: 7, lr: 0.5}}", "cluster.blocks={1: {workers: 3}}")
    branch = branch_plan(design(config, digits, never)).config
    assert (branch.training.steps, branch.training.optimizer.warmup) == (30, 10)
    assert not branch.training.blocks and not branch.cluster.blocks and branch.init.branch is None
    assert branch.seed != config.seed and branch.run_url == f"{config.run_url}/branch"


def test_blocks_of_unequal_depth_have_no_branch(make_config, tmp_path):
    config = make_config(*BRANCHED, "layers_per_block=[3,2,1]")
    with pytest.raises(ConfigError, match="the blocks have 3, 2, 1 layers: give all of them as many"):
        prepare(config, Run(Store(tmp_path / "toy")), never)
    assert not list(tmp_path.iterdir())


def test_a_branch_is_a_run_of_its_own_below_the_run(make_config, tmp_path):
    run = Run(Store(tmp_path / "toy"))
    run_plan = prepare(make_config(*BRANCHED), run, never)
    prepare_branch(run, branch_plan(run_plan))
    inner = run.branch
    assert inner.manifest.branch and inner.block(0).name == "branch" and inner.block(0).steps == 30
    assert inner.manifest.name == "toy/branch" and not run.manifest.branch
    assert inner.manifest.data_hash == run.manifest.data_hash
    assert inner.manifest.codebook_hash == run.manifest.codebook_hash
    prepare_branch(run, branch_plan(run_plan))  # it goes on
    with pytest.raises(ConfigError, match=r"is a run of another configuration: training.steps: 30 in run.json, 31 now"):
        prepare_branch(run, branch_plan(design(make_config(*BRANCHED, "init.branch.steps=31"), run_plan.data(), never)))


def test_a_branch_loops_its_layers_as_every_block_does(make_config, digits):
    looped = [*BRANCHED, "model.loops=[1,2,1,2,1,2]"]
    assert branch_plan(design(make_config(*looped), digits, never)).runs(0) == (0, 1, 1)
    unlike = make_config(*BRANCHED, "model.loops=[1,2,1,2,2,1]")
    with pytest.raises(ConfigError, match=r"gives the blocks \[1, 2\] and \[2, 1\]: give all of them the same"):
        branch_plan(design(unlike, digits, never))


@pytest.fixture
def branched(make_config, tmp_path):
    """A prepared run with a branch that has not begun."""
    run = Run(Store(tmp_path / "toy"))
    prepare_branch(run, branch_plan(prepare(make_config(*BRANCHED), run, never)))
    return run


def train_branch(run):
    """Commit the branch's last step; returns its weights by their names in a block's model."""
    model = run.branch.plan.model(0)
    torch.manual_seed(3)
    weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    named = {global_name(0, name): tensor for name, tensor in weights.items()}
    commit = run.branch.block(0).checkpoints.commit
    commit(30, {"model": named}, loss=1.0, attempt=1, fence=lambda: None)
    return weights


def started(run, block):
    """What a block starts from, by the names in its own model."""
    run = Run(run.store)
    names = [name for name, _ in run.plan.model(block, "meta").named_parameters()]
    return dict(read_block(run, run.manifest.init, block, 2 * block, names))


def matches(found, weights, block):
    own = {f"layers.{int(n.split('.')[1]) + 2 * block}.{n.split('.', 2)[2]}" if n.startswith("layers") else n: t
           for n, t in weights.items()}  # fmt: skip
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


def test_a_branch_that_is_done_is_noted_however_the_command_ended(branched):
    assert awaits_branch(branched)
    weights = train_branch(branched)
    assert awaits_branch(Run(branched.store))  # the command was killed before it noted it
    start_from_branch(branched, pytest.fail)
    assert not awaits_branch(Run(branched.store))
    assert all(matches(started(branched, block), weights, block) for block in range(3))


def test_a_branch_that_is_damaged_before_the_blocks_begin_is_trained_again(branched):
    weights, told = train_branch(branched), []
    start_from_branch(branched, told.append)
    shard = branched.branch.block(0).store.path / "step_00000030/model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert awaits_branch(Run(branched.store))
    train_branch(Run(branched.store))  # beside the damaged one, under another name
    again = Run(branched.store)
    start_from_branch(again, told.append)
    assert not awaits_branch(Run(branched.store)) and told == []
    assert matches(started(branched, 2), weights, 2)


def test_a_branch_that_was_removed_is_trained_again(branched):
    weights = train_branch(branched)
    start_from_branch(branched, pytest.fail)
    branched.store.remove("branch")
    again = Run(branched.store)
    assert awaits_branch(again)
    prepare_branch(again, branch_plan(again.plan))
    train_branch(again)
    start_from_branch(again, pytest.fail)
    assert matches(started(branched, 1), weights, 1)
