"""Blocks of different lengths, batches and averages: whoever asks how far a block goes is told of its own steps."""

import pytest
import torch

from dbtrain.coordinator.lifecycle import BlockState, Phase
from dbtrain.coordinator.progress import Progress
from dbtrain.coordinator.status import status
from dbtrain.coordinator.train import row
from dbtrain.errors import ConfigError, IncompleteRunError, ShardError
from dbtrain.evaluation.report import evaluate_run
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.experiments.baseline import reshaped
from dbtrain.experiments.chaos import Punisher
from dbtrain.method.split import global_name
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.storage.store import Store
from dbtrain.training.upstream import load_upstream
from tests.unit.conftest import never

OWN = "training.blocks={0: {steps: 7, batch_size: 5}, 2: {steps: 3, ema: 0.9}}"
"""Beside 4 steps of 8 samples without an average."""
LENGTHS = (7, 4, 3)


def test_a_manifest_and_a_configuration_tell_the_same_lengths(make_run):
    config, store = make_run(OWN)
    told = [(Run(store).manifest.steps(block), config.training.of_block(block).steps) for block in range(3)]
    assert told == [(steps, steps) for steps in LENGTHS]


def commit(run, block, step, roles=("model",)):
    """Commit a block's first weights, moved by some noise of its own."""
    own = run.block(block)
    generator = torch.Generator().manual_seed(block)
    named = {
        global_name(block, name): parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in run.plan.objective(block).get_submodule("model").named_parameters()
        if parameter.requires_grad
    }
    own.checkpoints.commit(step, dict.fromkeys(roles, named), loss=1.0, attempt=1, fence=lambda: None)


@pytest.fixture
def make_own(make_run):
    """A settled run of blocks of three lengths, committed at these steps."""

    def make(*steps, overrides=()):
        run = Run(make_run(OWN, *overrides)[1])
        for block, step in enumerate(steps):
            commit(run, block, step, ("model", "ema") if block == 2 else ("model",))
        return Run(run.store)

    return make


def test_a_block_is_done_at_its_own_last_step(make_own):
    run = make_own(6, 4, 3)
    assert [block.steps for block in run.blocks] == list(LENGTHS)
    assert [block.done for block in run.blocks] == [False, True, True]
    assert [block.committed for block in run.blocks] == [6, 4, 3]


def test_status_and_the_live_table_tell_each_block_of_its_own_steps(make_own):
    run = make_own(6, 4, 3)
    rows = [block.row for block in status(run)]
    assert [(r.step, r.steps, r.phase) for r in rows] == [(6, 7, "pending"), (4, 4, "done"), (3, 3, "done")]
    states = [BlockState(block, Phase.RUNNING) for block in range(3)]
    live = [row(run, run.plan, state, Progress(step=2, rate=0.5)) for state in states]
    assert [(r.steps, r.eta) for r in live] == [(7, 10.0), (4, 4.0), (3, 2.0)]


def test_a_merge_waits_for_the_longest_block_and_takes_the_average_of_the_one_that_has_it(make_own):
    run = make_own(6, 4, 3)
    with pytest.raises(IncompleteRunError, match="block 0 at step 6 of 7; run"):
        merge_and_verify(run)
    commit(run, 0, 7)
    result, _ = merge_and_verify(run)
    assert [(block, step) for block, step, *_ in result.blocks] == list(enumerate(LENGTHS))
    roles = [entry["role"] for entry in run.merged.read_json("config.json")["blocks"]]
    assert roles == ["model", "model", "ema"]
    assert {"chain", "mean", "first"} <= set(evaluate_run(run)[1]["test"])


def test_no_shard_is_bound_to_the_length_of_its_block(make_own, make_run):
    same = Run(make_run("out=memory://lengths")[1])
    assert [block.identity for block in make_own().blocks] == [block.identity for block in same.blocks]


def test_blocks_of_other_lengths_are_another_run_and_the_difference_is_named(make_own, make_config):
    run = make_own()
    assert prepare(make_config(OWN), run, never).config.training.of_block(0).steps == 7
    with pytest.raises(ConfigError, match=r"training.blocks.0.steps: 7 in run.json, 8 now; choose"):
        prepare(make_config(OWN.replace("steps: 7", "steps: 8")), run, never)
    with pytest.raises(ConfigError, match=r"training.blocks.2.ema: 0.9 in run.json, absent now"):
        prepare(make_config(OWN.replace(", ema: 0.9", "")), run, never)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.blocks.0.workers=2", "training.blocks.0.batch_size=5 cannot be shared by 2 workers"),
        ("training.micro_batch=4", r"micro_batch=4 .* 5 samples \(training.blocks.0.batch_size=5 over 1"),
        ("cluster.blocks.1.workers=3", "training.batch_size=8 cannot be shared by 3 workers"),
    ],
)
def test_the_batch_of_each_block_is_cut_before_anything_starts(make_config, override, words):
    config = make_config(OWN, override)
    with pytest.raises(ConfigError, match=words):
        prepare(config, Run(Store(config.run_url)), never)
    assert not Store(config.run_url).exists("run.json")


def test_a_greedy_block_waits_for_the_own_last_step_of_the_one_before_it(make_config):
    config = reshaped(make_config(OWN), "greedy")
    run = Run(Store(config.run_url))
    run.store.makedirs()
    run_plan = prepare(config, run, never)
    commit(run, 0, 4)
    model = run_plan.objective(1).get_submodule("model")
    with pytest.raises(ShardError, match="block 0 .* is at step 4 of 7"):
        load_upstream(model, run, range(1))
    commit(run, 0, 7)
    load_upstream(model, run, range(1))


def test_a_punishment_compares_the_own_last_steps(make_config):
    config = make_config(OWN)
    judge = Punisher(["config.yaml"], config, 5.0, 0, 0.0, lambda line: None)
    run = judge._folder("some") / config.name
    for block, steps in enumerate(((7, 4), (4,), (3, 4))):
        for step in steps:
            folder = run / "blocks" / f"{block:02d}" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(bytes([block, step]))
    last = [f"blocks/{block:02d}/step_{step:08d}/model.safetensors" for block, step in enumerate(LENGTHS)]
    assert judge._shards("some") == {path: bytes([b, s]) for path, b, s in zip(last, range(3), LENGTHS, strict=True)}
    assert judge._shards("none") == {}
