"""A loss in chunks is the loss at once, for less memory; and the same bits each time."""

import pytest
import torch
from torch import nn

from dbtrain.method.gaussian import GaussianNoise
from dbtrain.method.levels import LogNormal
from dbtrain.method.masking import MaskingNoise
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import PARAMETRISATIONS
from dbtrain.models.registry import architecture

VOCABULARY, TEXTS, LENGTH = 40, 3, 14
BATCH = {"tokens": torch.arange(TEXTS * LENGTH).view(TEXTS, LENGTH) * 7 % VOCABULARY}
KEY, POSITIONS = torch.tensor(5), torch.arange(TEXTS)
EVERY = pytest.mark.parametrize("arch", ["ar_lm", "masked_lm", "recurrent"])


def objective(arch, most, precision="fp32"):
    """One layer, all of its parameters awake; at most so many logits a chunk, None for the loss at once."""
    kind = architecture(arch)
    noise = GaussianNoise(LogNormal(-1.2, 1.2, 0.01, 80.0), 0.25, per_position=kind.per_position)
    own = {"vocabulary": VOCABULARY} if arch == "masked_lm" else {}
    torch.manual_seed(0)
    if kind.codes:
        own["codebook"] = nn.functional.normalize(torch.randn(VOCABULARY, 16), dim=1)
    model = kind(
        noise=MaskingNoise(VOCABULARY) if arch == "masked_lm" else noise,
        parametrisation=PARAMETRISATIONS[kind.natural_parametrisation](0.25, "unit"),
        depth=1,
        dim=32,
        heads=2,
        **own,
    )
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    model.cross_entropy.most = most
    return BlockObjective(model, range(1), 0.3, 0.9, precision)


def gradients(module):
    module.zero_grad()
    loss = module(BATCH, KEY, POSITIONS)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@EVERY
@pytest.mark.parametrize("positions", [1, 9, TEXTS * LENGTH - 1])
def test_loss_and_gradients_are_those_of_the_loss_at_once(arch, positions):
    loss, found = gradients(objective(arch, positions * VOCABULARY))
    wanted, each = gradients(objective(arch, None))
    assert torch.allclose(loss, wanted, rtol=1e-6)
    assert found.keys() == each.keys()
    for name, gradient in each.items():
        assert gradient.any() and torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name


@EVERY
def test_in_bfloat16_they_differ_by_its_roundings(arch):
    loss, found = gradients(objective(arch, 9 * VOCABULARY, "bf16"))
    wanted, each = gradients(objective(arch, None, "bf16"))
    assert torch.allclose(loss, wanted, rtol=1e-4)
    norm = torch.stack([g.norm() for g in each.values()]).norm()
    difference = torch.stack([(found[name] - g).norm() for name, g in each.items()]).norm()
    assert difference < 0.01 * norm


@EVERY
def test_the_same_bits_each_time(arch):
    module = objective(arch, 9 * VOCABULARY)
    (one, first), (two, second) = gradients(module), gradients(module)
    assert torch.equal(one, two) and all(torch.equal(first[name], second[name]) for name in first)


@EVERY
def test_no_logits_are_kept_for_the_backward_pass(arch):
    def largest(most):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            objective(arch, most)(BATCH, KEY, POSITIONS)
        return sizes.count(TEXTS * LENGTH * VOCABULARY), [n for n in sizes if n == 9 * VOCABULARY]

    assert largest(None)[0] > 0, "the test can fail"
    assert largest(9 * VOCABULARY) == (0, [])


@EVERY
def test_compiled_it_is_the_same_loss(arch):
    module = objective(arch, 9 * VOCABULARY)
    wanted, each = gradients(module)
    module.model.cross_entropy.compile(backend="aot_eager")
    found, again = gradients(module)
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert all(torch.allclose(again[name], gradient, atol=1e-6) for name, gradient in each.items())


def test_a_small_vocabulary_has_no_chunks():
    entropy = objective("ar_lm", 1 << 27).model.cross_entropy
    assert not entropy.wants_chunks(16 * 1024, 256) and entropy.wants_chunks(16 * 1024, 50_257)
