import math

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook
from dbtrain.method.gaussian import GaussianNoise, NoNoise
from dbtrain.method.levels import LogUniform
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import Direct, Unseen
from dbtrain.models.recurrent import Recurrent

CODES = make_codebook("orthogonal", 7, 8, seed=0)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 6], [2, 0, 5, 3, 5, 1]])
LEVEL = torch.tensor([0.4, 2.0])

FROM_NOISE = {"noise": NoNoise(spread=1.0), "parametrisation": Unseen()}


def recurrent(**changes):
    torch.manual_seed(0)
    noise, own = GaussianNoise(LogUniform(0.1, 10.0)), Direct(8**-0.5, "signal")
    settings = {"depth": 2, "prelude": 1, "coda": 1, "dim": 16, "heads": 4, "iterations": 5, "backprop": 2}
    return Recurrent(codebook=CODES, **{"noise": noise, "parametrisation": own, **settings, **changes})


def awake(**changes):
    model = recurrent(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model, noisy, context, level=LEVEL):
    return model.predict(range(2), noisy, level, context)


@pytest.fixture
def noisy():
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))


def test_each_place_is_shown_the_token_before_it_and_noised_is_its_own_code():
    example = recurrent().example({"tokens": TOKENS})
    assert example.context.tolist() == [[7, 3, 1, 4, 1, 5], [7, 2, 0, 5, 3, 5]]
    assert torch.equal(example.clean, CODES[TOKENS]) and torch.equal(example.target, TOKENS)


@pytest.mark.parametrize("unrolled", [False, True])
def test_nothing_leaks_from_a_later_token_or_its_code(unrolled, noisy):
    model = awake(unrolled=unrolled)
    base = logits(model, noisy, model.example({"tokens": TOKENS}).context)
    for place in range(6):
        tokens, codes = TOKENS.clone(), noisy.clone()
        tokens[:, place] = (tokens[:, place] + 1) % 7
        codes[:, place:] += 1
        context = model.example({"tokens": tokens}).context
        # the token itself is seen from the next place on only, its noisy code in its own place
        changed = logits(model, noisy, context)
        assert torch.equal(changed[:, : place + 1], base[:, : place + 1])
        assert torch.equal(logits(model, codes, context)[:, :place], base[:, :place])
        if place < 5:
            assert not torch.allclose(changed[:, place + 1 :], base[:, place + 1 :])


def test_the_layers_that_are_numbered_are_the_core_and_the_rest_is_stem_and_head():
    model = recurrent(depth=3, prelude=2, coda=1)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())  # the codebook is in no shard
    assert {".".join(n.split(".")[: 2 if n.startswith("layers") else 1]) for n in names} == {
        "stem", "head", "layers.0", "layers.1", "layers.2",
    }  # fmt: skip
    assert model.num_layers == 3


def test_unrolled_it_is_the_core_applied_to_its_own_state(noisy):
    model, context = awake(unrolled=True, **FROM_NOISE), recurrent().example({"tokens": TOKENS}).context

    def state(start, iterations):
        model.iterations, model.backprop = iterations, 1
        return model.iterate(range(2), start, LEVEL, context)[0]

    # a state is as wide as the layers, so that it can be given as the start
    assert torch.allclose(state(state(noisy, 1), 1), state(noisy, 2), atol=1e-5)
    assert torch.allclose(state(state(noisy, 2), 3), state(noisy, 5), atol=1e-5)
    assert not torch.allclose(state(noisy, 1), state(noisy, 2), atol=0.1)


def test_gradients_go_through_the_last_iterations_only(noisy):
    context = recurrent().example({"tokens": TOKENS}).context

    def gradients(iterations, backprop, start):
        model = awake(unrolled=True, **FROM_NOISE, iterations=iterations, backprop=backprop)
        logits(model, start, context).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())  # each has a state in the optimizer
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model = awake(unrolled=True, **FROM_NOISE, iterations=3, backprop=3)
    after = model.iterate(range(2), noisy, LEVEL, context)[0].detach()
    truncated = gradients(5, 2, noisy)
    assert torch.allclose(truncated, gradients(2, 2, after), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(truncated, gradients(5, 5, noisy), rtol=1e-2)


def test_the_denoiser_is_trained_by_one_pass_and_predicts_codes(noisy):
    model = awake()
    assert (model.iterations, model.backprop) == (1, 1)
    output = logits(model, noisy, model.example({"tokens": TOKENS}).context)
    assert output.shape == (2, 6, 7) and model.loss(output, TOKENS).shape == (2,)
    assert torch.allclose(model.denoised(output), output.softmax(-1) @ CODES)
    lower = logits(model, noisy, model.example({"tokens": TOKENS}).context, LEVEL / 2)
    assert not torch.allclose(output, lower)


@pytest.mark.parametrize("unrolled", [False, True])
def test_under_autocast_layers_add_up_in_float32(unrolled, noisy):
    model, seen = awake(unrolled=unrolled), []
    layers = [*model.stem.prelude, *model.layers.values(), *model.head.coda]
    for layer in layers:
        layer.register_forward_hook(lambda _, given, result: seen.extend([given[0].dtype, result.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, noisy, model.example({"tokens": TOKENS}).context)
    assert len(seen) >= 2 * len(layers) and set(seen) == {torch.float32}


def test_the_loss_at_the_start_is_that_of_guessing_and_training_lowers_it():
    model = recurrent()
    objective = BlockObjective(model, range(2), 1.0, 10.0, "fp32")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    # each token is the successor of the one before it: all but the first can be known
    tokens = (torch.arange(6)[None] + torch.arange(32)[:, None]) % 7
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = objective({"tokens": tokens}, torch.tensor(step), torch.arange(32))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(7))
    assert losses[-1] < math.log(7) / 6 * 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"heads": 3}, "model.heads=3"), ({"iterations": 2, "backprop": 3}, "model.backprop=3 is more than")],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recurrent(**changes)
