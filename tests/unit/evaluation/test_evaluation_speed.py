"""Evaluation in the precision of training and compiled: the same predictions but for roundings."""

import gc
import weakref

import pytest
import torch
from torch import nn

from dbtrain.config import load_config
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.speed import Speed, Stopwatch
from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.parametrisation import PARAMETRISATIONS
from dbtrain.models.registry import architecture
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data

SMALL = {
    "name": "toy",
    "blocks": 2,
    "model": {"arch": "dit", "depth": 2, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def run_plan():
    config = load_config(None, base=SMALL)
    return design(config, load_data(config), lambda *_: {})


@pytest.fixture
def block(run_plan):
    """Makes the model of a block, all of its parameters awake."""

    def make(number=0):
        torch.manual_seed(number)
        model = run_plan.model(number).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def traced(monkeypatch):
    """Graphs that are made while layers are compiled, without a compiler behind them."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self: vars(self).update(_compiled_call_impl=torch.compile(self._call_impl, backend=backend)),
    )
    yield graphs
    torch.compiler.reset()


def inputs(count):
    generator = torch.Generator().manual_seed(4)
    noisy = torch.randn(count, 1, 8, 8, generator=generator)
    return noisy, torch.full((count,), 0.7), torch.arange(count) % 10


@torch.no_grad()
def test_under_bf16_a_prediction_differs_by_its_roundings(block):
    plain, fast = block(), Speed("bf16", False, CPU).apply(block())
    wanted, found = (model.predict((0,), *inputs(6)) for model in (plain, fast))
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() < 0.02 * wanted.norm()


@torch.no_grad()
def test_in_fp32_it_is_the_prediction_itself(block):
    plain, fast = block(), Speed("fp32", False, CPU).apply(block())
    assert torch.equal(plain.predict((0,), *inputs(6)), fast.predict((0,), *inputs(6)))


@torch.no_grad()
def test_layers_are_compiled_once_for_all_blocks_and_batches(block, traced):
    speed = Speed("fp32", True, CPU)
    models = [speed.apply(block(number)) for number in (0, 1)]
    for count in (8, 8, 5, 1):  # a last batch is smaller
        for number, model in enumerate(models):
            found = model.predict((number,), *inputs(count))
            assert torch.allclose(found, block(number).predict((number,), *inputs(count)), atol=1e-5)
            assert len(found) == count
    assert len(traced) == 1
    assert speed.compiling_s > 0


@torch.no_grad()
def test_samples_are_those_that_are_drawn_without_it(run_plan, block, traced):
    blocks = [block(0), block(1)]
    labels, sampling = torch.arange(11) % 10, Sampling((80.0, 2.0, 0.2, 0.01), "heun", guidance=1.5)
    wanted = draw(run_plan, blocks.__getitem__, labels, (1, 8, 8), sampling, 4)
    speed = Speed("fp32", True, CPU)
    found = draw(run_plan, lambda b: speed.apply(blocks[b]), labels, (1, 8, 8), sampling, 4)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert len(traced) == 1


@torch.no_grad()
def test_with_a_cache_nothing_is_compiled(traced):
    kind = architecture("ar_lm")
    torch.manual_seed(0)
    codebook = nn.functional.normalize(torch.randn(7, 8), dim=1)
    noise = GaussianNoise(LogNormal(-1.2, 1.2, 0.01, 80.0), 0.25, per_position=True)
    parametrisation = PARAMETRISATIONS["logits"](0.25, "unit")
    model = kind(codebook=codebook, noise=noise, parametrisation=parametrisation, depth=1, dim=16, heads=2).eval()
    tokens, level, noisy = torch.tensor([[7, 1, 2]]), torch.full((1, 3), 0.5), torch.randn(1, 3, 8)
    wanted = model.predict(range(1), noisy, level, tokens, model.new_cache())
    fast = Speed("fp32", True, CPU).apply(model)
    assert torch.equal(fast.predict(range(1), noisy, level, tokens, fast.new_cache()), wanted)
    assert traced == []
    assert torch.allclose(fast.predict(range(1), noisy, level, tokens), wanted, atol=1e-5)
    assert len(traced) == 1


def test_a_model_is_let_go_as_soon_as_nobody_holds_it(block):
    model = Speed("bf16", False, CPU).apply(block())
    seen = weakref.ref(model)
    gc.disable()  # two blocks at once may not fit into memory
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("overrides", "device", "drawn", "wanted"),
    [
        ((), GPU, 10_000, ("fp32", False)),
        (("training.precision=bf16", "training.compile=true"), GPU, 10_000, ("bf16", True)),
        (("training.precision=bf16", "training.compile=true"), GPU, 64, ("bf16", False)),
        (("training.precision=bf16", "training.compile=true"), CPU, 10_000, ("fp32", False)),
        (("evaluation.precision=bf16", "evaluation.compile=true"), CPU, 0, ("bf16", True)),
        (
            ("training.precision=bf16", "training.compile=true", "evaluation.compile=false"),
            GPU,
            10_000,
            ("bf16", False),
        ),
        (("training.precision=bf16", "evaluation.precision=fp32"), GPU, 10_000, ("fp32", False)),
    ],
)
def test_by_default_it_is_as_the_run_was_trained_on_a_gpu(overrides, device, drawn, wanted):
    speed = Speed.of(load_config(None, overrides, base=SMALL), device, drawn)
    assert (speed.precision, speed.compiled) == wanted


def test_the_parts_of_an_evaluation_are_told_with_compilation_apart():
    watch, speed = Stopwatch(), Speed("bf16", True, CPU)
    watch.lap("reading")
    watch.parts["reading"] = 3.14
    speed.compiling_s = -20.0
    assert watch.line("drawing", speed) == "3.1 s reading, -20.0 s compiling, 20.0 s drawing (bf16)"
