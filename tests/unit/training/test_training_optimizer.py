import pytest
from torch import nn

from dbtrain.config import OptimizerConfig, TrainingConfig
from dbtrain.run.schedule import cosine
from dbtrain.training.optimizer import long_warmup, parameter_groups


def network():
    module = nn.Module()
    module.stem = nn.Embedding(5, 4)
    module.layers = nn.ModuleDict({"0": nn.ModuleDict({"mlp": nn.Linear(4, 4), "modulation": nn.Linear(4, 8)})})
    module.frozen = nn.Parameter(nn.Linear(2, 2).weight.detach(), requires_grad=False)
    return module


@pytest.mark.parametrize(("name", "muon"), [("adamw", set()), ("muon", {"layers.0.mlp.weight"})], ids=["adamw", "muon"])
def test_matrices_and_embeddings_are_decayed_and_vectors_are_not(name, muon):
    module = network()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, OptimizerConfig(name=name, weight_decay=0.3, clip=0))
    found = {names[id(p)]: (group["weight_decay"], group["use_muon"]) for group in groups for p in group["params"]}
    decayed = {"stem.weight", "layers.0.mlp.weight", "layers.0.modulation.weight"}
    assert set(found) == decayed | {"layers.0.mlp.bias", "layers.0.modulation.bias"}
    assert {name for name, (decay, _) in found.items() if decay == 0.3} == decayed
    assert {name for name, (_, use) in found.items() if use} == muon


@pytest.mark.parametrize(("steps", "warmup", "peak"), [(60, 100, 0.6), (100, 100, 1.0), (1, 3, 1 / 3)])
def test_a_warm_up_that_outlasts_the_training_is_told_with_the_rate_that_it_reaches(steps, warmup, peak):
    told = long_warmup(TrainingConfig(steps=steps, optimizer=OptimizerConfig(warmup=warmup)))
    assert f"warmup={warmup}" in told and f"steps={steps}" in told and f"rises to {peak:.0%} of" in told
    assert max(cosine(step, steps, warmup, 0.0) for step in range(steps)) == pytest.approx(peak)


@pytest.mark.parametrize(("steps", "warmup", "left", "tenth"), [(101, 100, 1, 10), (60, 50, 10, 6), (3, 2, 1, 0)])
def test_a_warm_up_of_most_of_the_training_is_told_with_what_is_left(steps, warmup, left, tenth):
    told = long_warmup(TrainingConfig(steps=steps, optimizer=OptimizerConfig(warmup=warmup)))
    assert f"warmup={warmup} takes most of training.steps={steps}: " in told
    assert f"has its peak with {left} step(s) left; " in told and told.endswith(
        f"set training.optimizer.warmup={tenth}"
    )
    rates = [cosine(step, steps, warmup, 0.0) for step in range(steps)]
    assert len(rates) - rates.index(max(rates)) == left + 1  # the last step of the warm-up has the peak


@pytest.mark.parametrize(("steps", "warmup"), [(200, 100), (5, 0), (1, 0)])
def test_a_warm_up_of_half_of_the_steps_or_less_is_not_worth_a_line(steps, warmup):
    assert long_warmup(TrainingConfig(steps=steps, optimizer=OptimizerConfig(warmup=warmup))) is None
