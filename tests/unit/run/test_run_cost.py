import functools

import pytest

from dbtrain.config import load_config
from dbtrain.experiments.baseline import end_to_end
from dbtrain.method.interface import BlockModel
from dbtrain.models import chunked_loss
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.run import cost
from dbtrain.run.cost import estimate
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data
from tests.unit.conftest import never

SIZE = ("model.dim=32", "training.ema=0.9")


@pytest.fixture
def plan(make_config, digits):
    return lambda *overrides: design(make_config(*SIZE, *overrides), digits, never)


def real(run_plan, block):
    counts = {True: 0, False: 0}
    for name, parameter in run_plan.model(block).named_parameters():
        counts[name.startswith("layers.")] += parameter.numel()
    return counts[True], counts[False]


def test_parameters_are_those_of_the_real_block(plan):
    run_plan = plan("layers_per_block=[1,2,3]")
    for block in range(3):
        memory = estimate(run_plan, block, 4, 1)
        assert memory.count == sum(real(run_plan, block))
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.average)
        assert parts == tuple(4 * memory.count * copies for copies in (1, 1, 2, 1))
        # 8 samples of an effective batch by 4: gradients stay from the first micro-batch to the second
        assert memory.total == sum(parts) + memory.activations + memory.workspace


def test_gradients_come_as_activations_go_where_a_step_is_one_micro_batch(plan):
    few, many = (estimate(plan(f"training.batch_size={size}"), 0, size, 1) for size in (1, 512))
    assert few.gradients > few.activations and many.activations > many.gradients
    for memory in (few, many):
        states = memory.parameters + memory.optimizer + memory.average + memory.workspace
        assert memory.total == states + max(memory.gradients, memory.activations)


@pytest.mark.parametrize("arch", ["vit", "dit"])
def test_a_compiled_block_keeps_less_than_one_that_is_not_and_no_less_than_it_must(plan, arch):
    given = [f"model.arch={arch}", "training.precision=bf16", "model.dim=64"]
    given += ["noise={}", "codebook={}"] if arch == "dit" else []
    eager, compiled = (estimate(plan(*given, f"training.compile={on}"), 1, 64, 1) for on in ("false", "true"))
    tokens, layers = 64 * (5 if arch == "vit" else 4), 2
    # in bfloat16 the three of attention, its output and the wide hidden state; in float32 the two sums
    least = layers * tokens * 64 * (2 * (3 + 1 + 4) + 4 * 2)
    assert least < compiled.activations < 0.9 * eager.activations
    assert compiled.flops == eager.flops


def test_a_third_of_the_layers_takes_a_third_of_the_memory_and_the_stem(plan):
    block, whole = (estimate(b, 0, 32, 1) for b in (plan(), plan("blocks=1")))
    layers, private = real(plan(), 0)
    assert 3 * layers + private == whole.count
    # each layer keeps as much as any other, so what is left of the block is its stem and head
    a_layer = (whole.activations - block.activations) / 4
    rest = block.activations - 2 * a_layer
    assert 0 < rest < a_layer
    fixed = rest + whole.workspace
    assert block.total <= (whole.total - fixed) / 3 + fixed + 5 * 4 * private
    assert block.total - block.workspace < 0.45 * (whole.total - whole.workspace)


def test_activations_and_flops_grow_with_the_micro_batch(plan):
    small, large = (estimate(plan(), 1, micro, 1) for micro in (4, 16))
    assert large.activations == pytest.approx(4 * small.activations, rel=0.05)
    assert large.flops == pytest.approx(4 * small.flops, rel=1e-6)
    assert large.parameters == small.parameters


@pytest.mark.parametrize(("patch", "tokens"), [(4, 5), (1, 65)])
def test_flops_of_a_layer_are_those_of_its_matrices_and_of_attention(plan, patch, tokens):
    two, one = (
        estimate(plan(f"model.patch={patch}", f"layers_per_block={sizes}"), 1, 4, 1).flops
        for sizes in ("[2,2,2]", "[2,1,3]")
    )
    dim, batch = 32, 4
    # forward and twice as much backward: qkv, out and the two of the MLP at every token, the modulation once
    matrices = 3 * 2 * batch * (12 * tokens + 6) * dim * dim
    # two products forward; backward the scores again and four gradients
    attention = (2 + 5) * 2 * batch * tokens * tokens * dim
    assert two - one == matrices + attention


def test_three_blocks_cost_little_more_than_the_whole(plan):
    run_plan, whole = plan(), plan("blocks=1")
    together = sum(estimate(run_plan, block, 4, 1).flops for block in range(3))
    assert 1 < together / estimate(whole, 0, 4, 1).flops < 1.4


@pytest.mark.parametrize(
    ("stage", "shared"),
    [(0, ()), (1, ("optimizer",)), (2, ("optimizer", "gradients")), (3, ("optimizer", "gradients", "parameters"))],
    ids=["0", "1", "2", "3"],
)
def test_zero_shares_what_its_stage_says_among_the_workers(plan, stage, shared):
    run_plan = plan(f"training.zero_stage={stage}")
    memory = estimate(run_plan, 0, 1, 4)
    for part, copies in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert getattr(memory, part) == 4 * memory.count * copies // (4 if part in shared else 1)


def test_what_is_offloaded_or_switched_off_takes_nothing(plan):
    assert estimate(plan("training.zero_stage=1", "training.offload=optimizer"), 0, 4, 1).optimizer == 0
    assert estimate(plan("training.ema=0"), 0, 4, 1).average == 0


def test_the_average_of_one_block_is_counted_for_it_alone(plan):
    run_plan = plan("training.blocks.1.ema=0")
    assert [estimate(run_plan, block, 4, 1).average > 0 for block in range(3)] == [True, False, True]


def test_the_baseline_gets_the_flops_of_the_blocks_and_all_layers(make_config, digits):
    config = make_config(*SIZE, "training.steps=100", "cluster.blocks.2.workers=2", "noise.ranges=calibrated")
    baseline = end_to_end(config)
    assert (baseline.method, baseline.blocks, baseline.name) == ("end_to_end", 1, "toy-end-to-end")
    warmup = {"warmup": config.training.optimizer.warmup}
    assert baseline.training.optimizer.model_copy(update=warmup) == config.training.optimizer
    assert baseline.model == config.model
    whole = estimate(design(baseline, digits, never), 0, 4, 1).flops
    blocks = design(config.model_copy(update={"noise": make_config().noise}), digits, never)
    spent = sum(estimate(blocks, block, 4, 1).flops for block in range(3))
    assert baseline.training.steps * whole == pytest.approx(100 * spent, rel=0.01)


@pytest.mark.parametrize("ranges", ["uniform", "paper"])
def test_every_policy_can_be_estimated(plan, ranges):
    assert estimate(plan(f"noise.ranges={ranges}"), 0, 4, 1).flops > 0


def test_a_loss_in_chunks_is_counted_once_and_keeps_no_logits(tmp_path, monkeypatch):
    base = {"name": "toy", "model": {"arch": "masked_lm", "depth": 3, "dim": 16, "heads": 2}}
    base |= {"data": {"source": "python_topics", "tokenizer": "bytes", "length": 32, "cache": str(tmp_path)}}
    config = load_config(None, base=base)
    run_plan = design(config, load_data(config), never)
    whole = estimate(run_plan, 0, 4, 1)
    for module in (cost, chunked_loss):
        monkeypatch.setattr(module, "MOST_LOGITS", 256 * 32)
    chunks = estimate(run_plan, 0, 4, 1)
    assert chunks.flops == whole.flops
    logits = 4 * 4 * 32 * 256
    assert whole.activations - chunks.activations > logits


def test_a_language_model_whose_loss_knows_no_chunks_is_counted_whole(tmp_path, monkeypatch):
    made = MaskedLM.__init__

    @functools.wraps(made)
    def without(self, **arguments):
        made(self, **arguments)
        del self.cross_entropy

    monkeypatch.setattr(MaskedLM, "__init__", without)
    monkeypatch.setattr(MaskedLM, "predict_loss", BlockModel.predict_loss)  # as a user's own network has it
    base = {"name": "toy", "model": {"arch": "masked_lm", "depth": 3, "dim": 16, "heads": 2}}
    base |= {"data": {"source": "python_topics", "tokenizer": "bytes", "length": 32, "cache": str(tmp_path)}}
    config = load_config(None, base=base)
    run_plan = design(config, load_data(config), never)
    before = estimate(run_plan, 0, 4, 1)
    monkeypatch.setattr(cost, "MOST_LOGITS", 256 * 32)
    memory = estimate(run_plan, 0, 4, 1)
    assert (memory.flops, memory.activations, memory.workspace) == (before.flops, before.activations, before.workspace)
