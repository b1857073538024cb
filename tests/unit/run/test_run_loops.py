"""Runs whose blocks apply some of their layers more than once."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.experiments.baseline import KINDS, baseline, reshaped, training_flops
from dbtrain.experiments.plan_table import show_plan
from dbtrain.run.config_diff import difference
from dbtrain.run.cost import estimate
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data
from tests.unit.conftest import never

TEXT = {
    "name": "toy",
    "blocks": 2,
    "data": {"source": "python_topics", "tokenizer": "letters", "length": 22},
    "codebook": {"source": "random", "dim": 21},
    "training": {"steps": 40, "batch_size": 6, "ema": 0.0},
}
MODELS = {
    "ar_lm": {"arch": "ar_lm", "depth": 4, "dim": 20, "heads": 2, "level_dim": 6},
    "masked_lm": {"arch": "masked_lm", "depth": 4, "dim": 20, "heads": 2, "level_dim": 6},
    "vit": {"arch": "vit", "depth": 4, "dim": 18, "heads": 2, "patch": 4},
    "dit": {"arch": "dit", "depth": 4, "dim": 18, "heads": 3, "patch": 4},
}
RANGES = {"masked_lm": "alpha", "dit": "paper"}
LOOPED = "model.loops=[1,2,2,1]"
EVERY = pytest.mark.parametrize("arch", MODELS)


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    cache = tmp_path_factory.mktemp("tokens")

    def make(arch, *overrides):
        text = arch in ("ar_lm", "masked_lm")
        data = TEXT["data"] | {"cache": str(cache)} if text else {"source": "digits"}
        noise = {"ranges": RANGES.get(arch, "uniform")}
        return load_config(None, overrides, base={**TEXT, "data": data, "model": MODELS[arch], "noise": noise})

    return make


@pytest.fixture(scope="module")
def plan(configure):
    def make(arch, *overrides):
        config = configure(arch, *overrides)
        return design(config, load_data(config), never)

    return make


def test_a_count_of_millions_is_refused(configure):
    with pytest.raises(ConfigError, match=r"model.loops.*less than or equal to 1000"):
        configure("vit", "model.loops=[1,1000000,1,1]")


def awake(run_plan, block):
    """The objective of a block whose layers are no longer the identity, as they are at the start."""
    objective = run_plan.objective(block)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return objective


def step(objective, run_plan):
    """Loss and gradients of one batch."""
    samples = torch.arange(6)
    loss = objective(run_plan.data().train.batch(samples, torch.device("cpu")), torch.tensor(3), samples)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in objective.named_parameters()}


@pytest.mark.parametrize(
    ("method", "runs"),
    [
        ("diffusion_blocks", [(0, 1, 0, 1), (2, 3, 2, 3)]),
        ("ensemble", [(0, 1, 0, 1), (2, 3, 2, 3)]),
        ("joint", [(0, 1, 0, 1), (2, 3, 2, 3)]),
        # what a block was trained on must not change because another follows it
        ("greedy", [(0, 1, 0, 1), (0, 1, 0, 1, 2, 3, 2, 3)]),
        ("forward_forward", [(0, 1, 0, 1), (0, 1, 0, 1, 2, 3, 2, 3)]),
        ("end_to_end", [(0, 1, 2, 3, 0, 1, 2, 3)]),
    ],
)
def test_no_group_of_layers_crosses_a_blocks_boundary(plan, method, runs):
    blocks = 1 if method == "end_to_end" else 2
    run_plan = plan("vit", "model.loops=[2,2,2,2]", f"method={method}", f"blocks={blocks}")
    assert [run_plan.runs(block) for block in range(blocks)] == runs


@EVERY
def test_counts_of_one_are_the_plain_model_bit_for_bit(plan, arch):
    plans = plan(arch), plan(arch, "model.loops=[1,1,1,1]")
    for block in range(2):
        (loss, gradients), (again, others) = (step(awake(p, block), p) for p in plans)
        assert torch.equal(loss, again) and gradients.keys() == others.keys()
        assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@EVERY
def test_a_looped_block_is_the_unrolled_one_and_its_gradients_add_up(plan, arch):
    """Of one block with counts 1,2,2,1: six layers, whose layers 3 and 4 have the weights of 1 and 2."""
    looped, unrolled = plan(arch, LOOPED, "blocks=1"), plan(arch, "model.depth=6", "blocks=1")
    short = awake(looped, 0)
    state, copied = short.state_dict(), unrolled.objective(0)
    twins = {0: 0, 1: 1, 2: 2, 3: 1, 4: 2, 5: 3}

    def twin(name):
        head, _, rest = name.partition("model.layers.")
        number, _, leaf = rest.partition(".")
        return f"model.layers.{twins[int(number)]}.{leaf}" if not head else name

    copied.load_state_dict({name: state[twin(name)] for name in copied.state_dict()})
    (loss, own), (wanted, each) = step(short, looped), step(copied, unrolled)
    assert torch.equal(loss, wanted)
    summed = {name: torch.zeros_like(gradient) for name, gradient in own.items()}
    for name, gradient in each.items():
        summed[twin(name)] += gradient
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-4, atol=1e-6)
        assert gradient.any()


@EVERY
def test_activation_checkpointing_of_every_application_gives_the_same_bits(plan, arch):
    plans = plan(arch, LOOPED), plan(arch, LOOPED, "training.activation_checkpointing=true")
    (loss, gradients), (again, others) = (step(awake(p, 1), p) for p in plans)
    assert torch.equal(loss, again) and all(torch.equal(gradients[n], others[n]) for n in gradients)


@EVERY
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_loops_cost_flops_and_activations_of_deeper_blocks_and_weights_of_their_own(plan, arch, checkpointing):
    again = f"training.activation_checkpointing={checkpointing}"
    looped = estimate(plan(arch, "model.loops=[1,2,1,2]", again), 0, 6, 1)
    deep, plain = (estimate(plan(arch, f"model.depth={depth}", again), 0, 6, 1) for depth in (6, 4))
    assert looped.flops == deep.flops > plain.flops
    assert looped.activations == deep.activations > plain.activations
    weights = [(m.count, m.parameters, m.gradients, m.optimizer) for m in (looped, plain)]
    assert weights[0] == weights[1]


@EVERY
def test_activation_checkpointing_lowers_the_estimate(plan, arch):
    plans = (plan(arch, "model.loops=[1,3,1,3]", f"training.activation_checkpointing={on}") for on in ("false", "true"))
    kept, inputs = (estimate(p, 0, 6, 1).activations for p in plans)
    assert inputs < 0.6 * kept


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward_forward"])
def test_baselines_have_the_same_loops_and_the_flops_of_the_blocks(configure, plan, kind):
    made = baseline(configure("ar_lm", "model.loops=[1,2,1,2]", "training.steps=100"), kind)
    assert made.config.model.loops == (1, 2, 1, 2)
    assert made.flops == pytest.approx(made.budget, rel=0.01)
    blocks = plan("ar_lm", "model.loops=[1,2,1,2]", "training.steps=100")
    assert made.budget == training_flops(blocks) > 1.2 * training_flops(plan("ar_lm", "training.steps=100"))


def test_forward_forward_trains_a_looped_block_by_its_activity_after_all_passes(configure, plan):
    looped = reshaped(configure("vit", "model.loops=[1,2,2,1]"), "forward_forward")
    run_plan = design(looped, load_data(looped), never)
    model = awake(run_plan, 0).get_submodule("model")
    samples = torch.arange(6)
    example = model.example(run_plan.data().train.batch(samples, torch.device("cpu")))
    first, _ = model.activities(run_plan.runs(1), example.clean, example.context)
    hidden, condition = model._model[0].open(example.clean, torch.ones(6), example.context)
    for layer in (0, 1, 1):
        hidden = model.layers[str(layer)](hidden, condition)
    assert torch.equal(first, hidden)


def test_a_run_without_loops_keeps_its_hashes_and_one_with_other_loops_is_refused_by_name(plan):
    plain, looped, other = (plan("masked_lm", *o) for o in ((), (LOOPED,), ("model.loops=[1,3,3,1]",)))
    # of main before there were loops and before widths were rounded: a run of then goes on
    assert (replace(plain, settled={}).architecture_hash, plain.config.content_hash()) == (
        "ae2afd53b68b5467",
        "45fe41285b9d44e0",
    )
    assert len({p.architecture_hash for p in (plain, looped, other)}) == 3
    assert len({p.config.content_hash() for p in (plain, looped, other)}) == 3
    stored = looped.config.model_dump(mode="json")
    assert "model.loops: [1, 2, 2, 1] in run.json, [1, 3, 3, 1] now" in difference(stored, other.config)
    assert "model.loops: [1, 2, 2, 1] in run.json, absent now" in difference(stored, plain.config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.loops=[1,2]", r"model.loops=\[1, 2\] has 2 counts.*'model.loops=\[1, 2, 1, 2\]'"),
        ("model.loops=[1,0,1,1]", "model.loops.1=0: it must be greater than or equal to 1"),
        ("model.loops=2", "model.loops=2 is no list"),
    ],
)
def test_counts_that_do_not_fit_are_refused_in_words(configure, override, message):
    with pytest.raises(ConfigError, match=message):
        configure("masked_lm", override)


def test_a_recurrent_core_is_not_looped():
    base = {**TEXT, "blocks": 1, "model": {"arch": "recurrent", "depth": 2, "dim": 20, "heads": 2}}
    with pytest.raises(ConfigError, match="model.arch=recurrent iterates its whole core: leave it out"):
        load_config(None, ["model.loops=[2,2]"], base=base)


def test_the_plan_shows_depth_and_order_of_every_block(configure):
    shown = io.StringIO()
    show_plan(configure("ar_lm", LOOPED), Console(file=shown, width=160), Console(file=io.StringIO()))
    assert "block 0 has 2 layers and is 3 deep, applied as 0 1 1" in shown.getvalue()
    assert "block 1 has 2 layers and is 3 deep, applied as 2 2 3" in shown.getvalue()
    assert "end-to-end has 4 layers and is 6 deep, applied as 0 1 2 1 2 3" in shown.getvalue()
    plain = io.StringIO()
    show_plan(configure("ar_lm"), Console(file=plain, width=160), Console(file=io.StringIO()))
    assert "deep" not in plain.getvalue()
