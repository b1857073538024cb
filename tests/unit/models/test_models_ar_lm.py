import math

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook
from dbtrain.method.draws import Draws
from dbtrain.method.gaussian import GaussianNoise, NoNoise
from dbtrain.method.levels import LogUniform
from dbtrain.method.objective import BlockObjective
from dbtrain.method.parametrisation import Direct, Unseen
from dbtrain.models.ar_lm import ARLM
from dbtrain.models.llama import KVCache, rotate

CODES = make_codebook("orthogonal", 11, 16, seed=0)
LENGTH = 12
NOISE, OWN = GaussianNoise(LogUniform(0.1, 10.0), per_position=True), Direct(0.25, "signal")
STREAMS = pytest.mark.parametrize("stream", ["single", "concat"])


def lm(**changes):
    torch.manual_seed(0)
    return ARLM(
        **{"codebook": CODES, "noise": NOISE, "parametrisation": OWN, "depth": 4, "dim": 16, "heads": 2, **changes}
    )


def awake(**changes):
    """A model whose modulation and head are not at their start of zero."""
    model = lm(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(seed=2, count=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (count, LENGTH), generator=generator)
    level = torch.rand(count, LENGTH, generator=generator) * 5 + 0.1
    return tokens, CODES[tokens] + level[..., None] * torch.randn(count, LENGTH, 16, generator=generator), level


def logits(model, tokens, noisy, level, layers=range(4)):
    return model.predict(layers, noisy, level, model.before(tokens))


def groups(model):
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())  # nothing else is stored in a shard
    return {".".join(name.split(".")[: 2 if name.startswith("layers.") else 1]) for name in names}


def test_parameters_lie_in_the_three_groups_under_their_numbers_in_the_whole_model():
    assert groups(lm()) == {"stem", "head", *(f"layers.{i}" for i in range(4))}
    assert groups(lm(layers=range(2, 4))) == {"stem", "head", "layers.2", "layers.3"}
    assert not lm().get_buffer("codebook").requires_grad


@STREAMS
@pytest.mark.parametrize("at", [0, 5, LENGTH - 1])
def test_nothing_before_a_changed_future_moves(stream, at):
    """The leak that would make a likelihood a lie: token `at`, its noise or its level reaching an earlier slot."""
    model, (tokens, noisy, level) = awake(stream=stream), inputs()
    before = logits(model, tokens, noisy, level)
    changed = tokens.clone()
    changed[:, at:] = (changed[:, at:] + 1) % 11
    louder, dirtier = level.clone(), noisy.clone()
    louder[:, at:] *= 3
    dirtier[:, at:] += 7.0
    after = logits(model, changed, dirtier, louder)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.isclose(before[:, at:], after[:, at:]).all(dim=-1).any()
    # the token itself is the target: only its noisy code may tell of it, and only to its own slot and later ones
    assert torch.equal(before[:, : at + 1], logits(model, changed, noisy, level)[:, : at + 1])


@STREAMS
def test_every_earlier_token_is_seen(stream):
    model, (tokens, noisy, level) = awake(stream=stream), inputs(count=1)
    before = logits(model, tokens, noisy, level)
    for at in range(LENGTH - 1):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 11
        assert not torch.allclose(before[:, -1], logits(model, changed, noisy, level)[:, -1])


def test_a_noisy_code_of_the_concatenated_stream_is_seen_by_its_own_slot_only():
    model, (tokens, noisy, level) = awake(stream="concat"), inputs(count=1)
    before, dirtier = logits(model, tokens, noisy, level), noisy.clone()
    dirtier[:, 4] += 5
    moved = (before != logits(model, tokens, dirtier, level)).any(dim=-1)[0]
    assert moved.tolist() == [i == 4 for i in range(LENGTH)]


@STREAMS
def test_slots_one_by_one_through_a_cache_equal_all_at_once(stream):
    model, (tokens, noisy, level) = awake(stream=stream), inputs()
    whole, context = logits(model, tokens, noisy, level), model.before(tokens)
    for cuts in ([*range(1, LENGTH)], [5], [3, 4, 9], []):
        cache, parts = KVCache(), []
        for a, b in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            z, s = noisy[:, a:b], level[:, a:b]
            parts.append(model.predict(range(4), z, s, context[:, a:b], cache))
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
        assert cache.length == LENGTH and sorted(cache.layers) == [0, 1, 2, 3]
        assert {k.shape[2] for k, _ in cache.layers.values()} <= set(range(LENGTH, 2 * LENGTH))


def test_a_cache_holds_no_more_for_two_streams_than_for_one():
    sizes = []
    for stream in ("single", "concat"):
        model, (tokens, noisy, level), cache = awake(stream=stream), inputs(), KVCache()
        model.predict(range(4), noisy, level, model.before(tokens), cache)
        sizes.append([k.shape for k, _ in cache.layers.values()])
    assert sizes[0] == sizes[1] == [(3, 2, LENGTH, 8)] * 4


@STREAMS
def test_layers_are_the_identity_at_the_start_and_the_loss_that_of_guessing(stream, before_head):
    model, (tokens, noisy, level) = lm(stream=stream), inputs()
    context = model.before(tokens)
    ends = [before_head(model, range(count), noisy, level, context)[0] for count in (4, 0)]
    assert torch.equal(*ends)
    loss = model.loss(logits(model, tokens, noisy, level), tokens)
    assert loss.shape == (3, LENGTH) and loss.flatten().tolist() == pytest.approx([math.log(11)] * 3 * LENGTH)


def test_the_weights_of_a_block_compute_the_same_inside_the_whole_model():
    whole, block = awake(), lm(layers=range(2, 4)).eval()
    block.load_state_dict({name: whole.state_dict()[name] for name in block.state_dict()})
    assert torch.equal(logits(block, *inputs(), range(2, 4)), logits(whole, *inputs(), range(2, 4)))
    assert not torch.allclose(logits(whole, *inputs(), range(1, 3)), logits(whole, *inputs(), range(2, 4)))


def test_example_noises_the_code_of_each_token_and_shows_the_one_before():
    tokens = torch.tensor([[3, 0, 10], [1, 1, 2]])
    example = lm().example({"tokens": tokens})
    assert torch.equal(example.clean, CODES[tokens]) and example.target is tokens
    assert example.context.tolist() == [[11, 3, 0], [11, 1, 1]]


def test_denoised_is_the_expected_code():
    output = torch.full((1, 2, 11), -1000.0)
    output[0, 0, 7] = output[0, 1, 2] = output[0, 1, 3] = 0.0
    expected = torch.stack([CODES[7], (CODES[2] + CODES[3]) / 2])[None]
    assert torch.allclose(lm().denoised(output), expected, atol=1e-6)
    assert lm().denoised(output.bfloat16()).dtype == torch.float32


@STREAMS
@pytest.mark.parametrize(
    ("noise", "own"), [(NOISE, OWN), (NoNoise(per_position=True), Unseen())], ids=["noise", "none"]
)
def test_a_few_steps_learn_a_text_with_a_rule(stream, noise, own):
    """Token i is token i-1 plus one: attention is not needed, the shift of the context is."""
    model = lm(stream=stream, noise=noise, parametrisation=own, layers=range(2))
    objective = BlockObjective(model, range(2), 1.0, 10.0, "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        start = torch.randint(11, (16, 1), generator=torch.Generator().manual_seed(step))
        batch = {"tokens": (start + torch.arange(LENGTH)) % 11}
        loss = objective(batch, torch.tensor(step), torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.45  # of which log(11)/12 = 0.2 is the first token, which nothing tells


def test_the_objective_draws_a_level_for_each_position():
    objective = BlockObjective(lm(), range(4), 0.1, 10.0, "fp32")
    tokens, _, _ = inputs()
    _, _, level = objective._noisy({"tokens": tokens}, Draws(torch.tensor(3), torch.arange(3)))
    assert level.shape == (3, LENGTH) and len(level.unique()) == 3 * LENGTH


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        return float((rotate(q, torch.tensor([i])) * rotate(k, torch.tensor([j]))).sum())

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-4) and score(7, 3) != pytest.approx(score(7, 4))
    assert torch.equal(rotate(q, torch.tensor([0])), q)


@pytest.mark.parametrize("changes", [{"heads": 3}, {"dim": 18, "heads": 6}], ids=str)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ConfigError, match="is not an even multiple of model.heads"):
        lm(**changes)


@STREAMS
def test_under_bfloat16_nothing_leaks_and_the_loss_is_near_that_of_float32(stream):
    model, (tokens, noisy, level) = awake(stream=stream), inputs()
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    with torch.autocast("cpu", torch.bfloat16):
        one, two = logits(model, tokens, noisy, level), logits(model, changed, noisy, level)
    assert torch.equal(one[:, :7], two[:, :7]) and not torch.equal(one[:, 7:], two[:, 7:])
    losses = [BlockObjective(model, range(4), 0.1, 10.0, p) for p in ("fp32", "bf16")]
    full, half = (float(o({"tokens": tokens}, torch.tensor(1), torch.arange(3)).detach()) for o in losses)
    assert half == pytest.approx(full, rel=0.02) and half != full
