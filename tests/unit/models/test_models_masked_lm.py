import itertools
import math

import numpy as np
import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.draws import Draws
from dbtrain.method.masking import MaskingNoise
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import Tokens
from dbtrain.models.masked_lm import MaskedLM

MARGINALS = torch.tensor([0.6, 0.3, 0.1])
ENTROPY = float(torch.special.entr(MARGINALS.double()).sum())
MASK = 3


def masked_lm(**changes):
    torch.manual_seed(0)
    settings = {"vocabulary": 3, "depth": 6, "dim": 16, "heads": 4}
    return MaskedLM(noise=MaskingNoise(MASK), parametrisation=Tokens(), **{**settings, **changes})


def awake(**changes):
    model = masked_lm(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def output(model, noisy, level, layers=None):
    layers = range(model.num_layers) if layers is None else layers
    return model.predict(layers, noisy, level, noisy[:, :0])


def know_marginals(model):
    """Whatever it is shown, it predicts the marginals: its normed state is constant, and its weights read it so."""
    for parameter in model.parameters():
        parameter.zero_()
    model.stem.tokens.weight.fill_(1.0)
    model.head.linear.weight.copy_((MARGINALS.log() / 16)[:, None].expand(-1, 16))


def exact_share(model, low, high):
    """Nats a token of the slice, exactly: all texts and masks, and Gauss-Legendre on a polynomial in the quantile."""
    length = 4
    texts = torch.tensor(list(itertools.product(range(3), repeat=length)))
    chance = MARGINALS[texts].prod(dim=1)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(5))
    low, high = model.noise.cdf(torch.tensor([low, high]))
    total = 0.0
    for node, width in zip(nodes, weights, strict=True):
        t = model.noise.quantile((low + high) / 2 + (high - low) / 2 * node)
        level = t.expand(len(texts))
        for hidden in itertools.product([False, True], repeat=length):
            mask = torch.tensor(hidden)
            likely = t ** mask.sum() * (1 - t) ** (length - mask.sum())
            noisy = texts.masked_fill(mask, MASK)
            loss = model.noise.weight(level) * model.loss(output(model, noisy, level), texts)
            total += float((high - low) / 2 * width * likely * (chance * loss).sum())
    return total


def test_true_marginals_of_independent_tokens_cost_their_entropy_and_blocks_sum_to_the_whole():
    model = masked_lm(depth=1)
    with torch.no_grad():
        know_marginals(model)
        shares = [exact_share(model, 1 - (b + 1) / 3, 1 - b / 3) for b in range(3)]
        whole = exact_share(model, 0.0, 1.0)
    assert shares == pytest.approx([ENTROPY / 3] * 3, rel=1e-5)
    assert whole == pytest.approx(ENTROPY, rel=1e-5)


def test_wrong_marginals_cost_their_cross_entropy():
    model = masked_lm(depth=1)
    with torch.no_grad():
        assert exact_share(model, 0.0, 1.0) == pytest.approx(math.log(3), rel=1e-5)


def test_the_objective_estimates_the_slices_mean():
    model = masked_lm()
    with torch.no_grad():
        know_marginals(model)
        texts = torch.multinomial(MARGINALS, 4 * 20000, True, generator=torch.Generator().manual_seed(0)).view(-1, 4)
        objective = BlockObjective(model, range(2), 1 / 3, 2 / 3, "fp32")
        loss = objective({"tokens": texts}, torch.tensor(5), torch.arange(20000))
    # its mean over the slice's levels; times their share of all levels it is the block's share of the ELBO
    assert float(loss) * (objective.q_high - objective.q_low) == pytest.approx(ENTROPY / 3, rel=0.03)


def test_seen_tokens_stay_and_the_mask_is_never_predicted():
    model, noisy = awake(), torch.tensor([[0, MASK, 2, MASK]])
    logits = output(model, noisy, torch.tensor([0.5]))
    assert logits.shape == (1, 4, 3)
    probabilities = model.denoised(logits)
    assert probabilities[0, 0].tolist() == [1, 0, 0] and probabilities[0, 2].tolist() == [0, 0, 1]
    assert (probabilities[0, [1, 3]] > 0).all()
    loss = model.loss(logits, torch.tensor([[0, 1, 2, 1]]))
    hidden = -logits.log_softmax(-1)[0, [1, 3], 1].sum() / 4
    assert loss.item() == pytest.approx(hidden.item(), rel=1e-6)


def test_gradients_are_finite_and_nothing_is_learnt_from_seen_tokens():
    model = awake()
    for noisy, zero in ((torch.tensor([[0, 1, 2, 1]]), True), (torch.tensor([[0, MASK, 2, MASK]]), False)):
        model.zero_grad()
        model.loss(output(model, noisy, torch.tensor([0.5])), torch.tensor([[0, 1, 2, 1]])).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert gradients.isfinite().all() and bool((gradients == 0).all()) == zero


def test_a_prediction_depends_on_both_sides_and_on_the_level():
    model, level = awake(), torch.tensor([0.5])
    base = output(model, torch.tensor([[0, 1, MASK, 2]]), level)[0, 2]
    for changed in ([[1, 1, MASK, 2]], [[0, 1, MASK, 0]], [[0, 1, MASK, MASK]]):
        assert not torch.allclose(base, output(model, torch.tensor(changed), level)[0, 2])
    assert not torch.allclose(base, output(model, torch.tensor([[0, 1, MASK, 2]]), torch.tensor([0.9]))[0, 2])


def test_a_block_computes_the_same_alone_and_inside_the_whole():
    whole, block = awake(), masked_lm(layers=range(2, 4)).eval()
    assert set(whole.state_dict()) == {name for name, _ in whole.named_parameters()}
    assert {name.split(".")[0] for name in whole.state_dict()} == {"stem", "layers", "head"}
    block.load_state_dict({name: whole.state_dict()[name] for name in block.state_dict()})
    noisy, level = torch.tensor([[0, MASK, 2, MASK]]), torch.tensor([0.5])
    assert torch.equal(output(block, noisy, level, range(2, 4)), output(whole, noisy, level, range(2, 4)))
    assert not torch.allclose(output(whole, noisy, level), output(whole, noisy, level, range(2, 4)))


def test_training_finds_the_entropy_of_texts_that_repeat_a_token():
    """Four equal tokens: 1 token is to be paid for, the others follow from it."""
    model = masked_lm(depth=2)
    objective = BlockObjective(model, range(2), 0.0, 1.0, "fp32")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        texts = torch.multinomial(MARGINALS, 64, True, generator=generator)[:, None].expand(-1, 4)
        optimizer.zero_grad()
        objective({"tokens": texts}, torch.tensor(step), torch.arange(64)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        texts = torch.multinomial(MARGINALS, 8000, True, generator=generator)[:, None].expand(-1, 4)
        loss = objective({"tokens": texts}, torch.tensor(9), torch.arange(8000))
    assert ENTROPY / 4 * 0.95 < float(loss) < ENTROPY / 4 * 1.2


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="model.dim=16 is not an even multiple of model.heads=3"):
        masked_lm(heads=3)


def test_draws_of_the_noise_are_those_of_the_positions():
    noise, clean = MaskingNoise(MASK), torch.zeros(8, 4, dtype=torch.int64)
    whole = noise.corrupt(clean, torch.full((8,), 0.5), Draws(torch.tensor(1), torch.arange(8)))
    part = noise.corrupt(clean[4:], torch.full((4,), 0.5), Draws(torch.tensor(1), torch.arange(4, 8)))
    assert torch.equal(whole[4:], part)


def test_the_levels_of_a_training_batch_cover_the_slice_evenly():
    model, seen = masked_lm(depth=1), []
    corrupt = model.noise.corrupt
    model.noise.corrupt = lambda clean, level, draws: seen.append(level) or corrupt(clean, level, draws)
    objective = BlockObjective(model, range(1), 1 / 3, 2 / 3, "fp32")
    objective({"tokens": torch.zeros(60, 4, dtype=torch.int64)}, torch.tensor(4), torch.arange(60))
    share = (model.noise.cdf(seen[0]) - objective.q_low) / (objective.q_high - objective.q_low)
    assert float((share.sort().values - (torch.arange(60) + 0.5) / 60).abs().max()) < 0.05
