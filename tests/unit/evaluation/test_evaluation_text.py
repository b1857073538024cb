"""Bits, generation and codebook of a merged autoregressive model whose weights are random, so nothing cancels."""

import math

import numpy as np
import pytest
import torch

from dbtrain.config import load_config
from dbtrain.data.packed import TokenWindows
from dbtrain.data.splits import evenly
from dbtrain.data.tokenizers import Bytes, Letters
from dbtrain.errors import ConfigError
from dbtrain.evaluation.loading import all_blocks
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.evaluation.text import bits as room
from dbtrain.evaluation.text.bits import bits, negative_log
from dbtrain.evaluation.text.generate import Generator, continue_text
from dbtrain.experiments.baseline import end_to_end
from dbtrain.method.split import global_name
from dbtrain.run.calibrate import calibrate
from dbtrain.run.corpus_codebook import corpus_codebook
from dbtrain.run.cost import estimate
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data

CPU = torch.device("cpu")
BASE = {
    "name": "toy",
    "blocks": 3,
    "model": {"arch": "ar_lm", "depth": 3, "dim": 16, "heads": 2},
    "data": {"source": "python_topics", "length": 24},
    "codebook": {"dim": 32},
    "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    "training": {"steps": 4, "batch_size": 8},
    "evaluation": {"texts": 10, "batch_size": 4},
}
STREAMS = pytest.mark.parametrize("stream", ["single", "concat"])


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    cache = tmp_path_factory.mktemp("tokens")
    return lambda *overrides: load_config(None, [f"data.cache={cache}", *overrides], base=BASE)


@pytest.fixture(scope="module")
def data(configure):
    return load_data(configure())


def merged(config, data):
    run_plan = design(config, data, calibrate)

    def load(block):
        generator = torch.Generator().manual_seed(block)
        named = run_plan.model(block).state_dict().items()
        return {global_name(block, n): t + 0.15 * torch.randn(t.shape, generator=generator) for n, t in named}

    return MergedModel(run_plan, all_blocks(run_plan, load, CPU), CPU)


@STREAMS
@pytest.mark.parametrize("start", ["zero", "noise"])
def test_a_merged_model_says_nothing_of_a_token_from_that_token(configure, data, stream, start):
    """What makes the bits a likelihood: along the whole chain, no slot moves with its own or a later token."""
    model = merged(configure(f"model.stream={stream}", f"evaluation.start={start}"), data)
    tokens = data.test.batch(torch.arange(3), CPU)["tokens"]
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 27
    with torch.no_grad():
        one, two = (readouts(model.evaluations({"tokens": t}, model.draws(torch.arange(3)))) for t in (tokens, changed))
    assert set(one) == {"chain", "mean", "first", "after_0", "after_1", "after_2"}
    for name in one:
        assert torch.equal(one[name][:, :11], two[name][:, :11])
        assert not torch.equal(one[name][:, 11], two[name][:, 11])
        assert torch.allclose(one[name].sum(-1), torch.tensor(1.0))


@pytest.mark.parametrize("start", ["zero", "noise"])
def test_bits_are_those_of_the_probabilities_by_hand(configure, data, monkeypatch, start):
    config = configure("evaluation.texts=6", f"evaluation.start={start}")
    model, shown = merged(config, data), evenly(len(data.test), 6)
    found = bits(model, data.test, config.evaluation)
    batch = data.test.batch(shown, CPU)
    with torch.no_grad():
        whole = readouts(model.evaluations(batch, model.draws(shown)))
    for name in found:
        own = whole[name].gather(-1, batch["tokens"][..., None]).log2().sum()
        assert found[name] == pytest.approx(-float(own) / (6 * 24), rel=1e-5)
    assert found["first"] == found["after_0"] != found["chain"] == found["after_2"]
    # how the samples are cut into batches does not matter
    monkeypatch.setattr(room, "MOST_LOGITS", 2 * 24 * 27)
    assert bits(model, data.test, config.evaluation) == pytest.approx(found, rel=1e-5)


def test_bits_are_per_character_of_the_text(configure):
    class Pairs(Bytes):
        def characters(self, tokens):
            return 2 * len(tokens)

    config = configure("data.tokenizer=bytes", "codebook.source=random")
    data = load_data(config)
    windows = TokenWindows(np.asarray(data.test.tokens).reshape(-1), 24, Pairs())
    model = merged(config, data)
    single, double = (bits(model, split, config.evaluation)["chain"] for split in (data.test, windows))
    assert double == pytest.approx(single / 2)


def test_a_uniform_guess_costs_log2_of_the_vocabulary_and_an_impossible_token_a_finite_sum():
    assert negative_log(torch.full((2, 5), 1 / 27)) == pytest.approx(10 * math.log(27), rel=1e-5)
    assert negative_log(torch.zeros(1, 1)) == pytest.approx(126 * math.log(2))


@pytest.mark.parametrize(("size", "most"), [(10, None), (10, 3), (10, 10), (10, 99), (97, 40)])
def test_samples_are_spread_evenly(size, most):
    numbers = evenly(size, most).tolist()
    assert len(numbers) == min(size, most or size) and numbers == sorted(set(numbers)) and numbers[-1] < size
    gaps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


@STREAMS
@pytest.mark.parametrize("readout", ["mean", "chain", "first"])
@pytest.mark.parametrize(
    ("steps", "loops"), [(1, []), (2, []), (1, ["model.depth=4", "model.loops=[2,2,3,1]"])], ids=["1", "2", "looped"]
)
def test_the_cached_distribution_of_every_token_is_the_uncached_one(configure, data, stream, readout, steps, loops):
    config = configure(
        f"model.stream={stream}", f"evaluation.readout={readout}", f"evaluation.steps_per_block={steps}", *loops
    )
    model, tokens = merged(config, data), data.test.batch(torch.arange(2), CPU)["tokens"]
    generator = Generator(model, config.evaluation, seed=3)
    assert len(generator.caches) == 3 * steps
    context = model.blocks[0].before(tokens)
    with torch.no_grad():
        whole = readouts(model.evaluations({"tokens": tokens}, model.draws(torch.arange(2)), steps))[readout]
        found = [
            generator.probabilities(context[:, :7]),
            *(generator.probabilities(c) for c in context[:, 7:].split(1, 1)),
        ]
    assert torch.allclose(torch.stack(found, dim=1), whole[:, 6:], atol=2e-5)


@STREAMS
@pytest.mark.parametrize("start", ["zero", "noise"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("loops", [[], ["model.depth=4", "model.loops=[2,2,3,1]"]], ids=["once", "looped"])
def test_generation_with_a_cache_equals_generation_without(configure, data, stream, start, temperature, loops):
    config = configure(f"model.stream={stream}", f"evaluation.start={start}", *loops)
    model, prompt = merged(config, data), data.test.batch(torch.arange(2), CPU)["tokens"][:, :5]
    cached = Generator(model, config.evaluation, seed=3).continue_from(prompt, 12, temperature)
    tokens = prompt
    for _ in range(12):  # a fresh generator for every token sees the whole text at once
        fresh = Generator(model, config.evaluation, seed=3)
        tokens = torch.cat([tokens, fresh.continue_from(tokens, 1, temperature)], dim=1)
    assert torch.equal(tokens[:, 5:], cached)
    other = Generator(model, config.evaluation, seed=4).continue_from(prompt, 12, temperature)
    assert torch.equal(other, cached) == (temperature == 0 and start == "zero")


def test_tokens_are_drawn_by_their_probabilities(configure, data):
    generator = Generator(merged(configure(), data), configure().evaluation, seed=0)
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, 4)
    for temperature, expected in ((1.0, [0.1, 0.0, 0.6, 0.3]), (0.5, [0.01 / 0.46, 0.0, 0.36 / 0.46, 0.09 / 0.46])):
        drawn = generator._draw(probabilities, temperature, 0).bincount(minlength=4) / 20_000
        assert drawn.tolist() == pytest.approx(expected, abs=0.015) and drawn[1] == 0


def test_text_is_continued_to_the_end_of_the_window_and_not_beyond(configure, data):
    model = merged(configure(), data)
    for prompt in ("", "the cat "):
        text = continue_text(model, prompt, 24 - len(prompt), 1.0, 0)
        assert len(text) == 24 - len(prompt) and set(text) <= set(" abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ConfigError, match="prompt of 8 tokens and --length 17 exceed the 24"):
        continue_text(model, "the cat ", 17, 1.0, 0)


def test_the_range_of_a_text_is_calibrated_on_its_positions(configure, data, monkeypatch):
    from dbtrain.run import pilot as pilot_room

    monkeypatch.setattr(pilot_room, "PILOT_STEPS", 60)
    run_plan = design(configure("noise.ranges=calibrated"), data, calibrate)
    curve = run_plan.distribution["calibration"]
    assert 1.5 < curve["left_open_nats"] < math.log(27)
    assert run_plan.ranges.edges[0] > 3 * run_plan.ranges.edges[-1] > 0
    answers = pilot_room.ask_pilots(configure(), data, run_plan.codebook)
    probabilities = answers.probabilities
    assert answers.sample.unique(return_counts=True)[1].tolist() == [32] * 64  # 16 positions, by two pilots
    assert probabilities.shape == (2048, 27) and torch.allclose(probabilities.sum(-1), torch.ones(2048).double())


def test_the_end_to_end_baseline_has_equal_flops_and_a_level_a_position(configure, data):
    config = configure()
    whole = end_to_end(config)
    run_plan = design(whole, data, calibrate)
    blocks = design(config, data, calibrate)
    own = whole.training.steps * estimate(run_plan, 0, 2, 1).flops
    theirs = 4 * sum(estimate(blocks, b, 2, 1).flops for b in range(3))
    assert own == pytest.approx(theirs, rel=0.15)  # 4 steps: rounded to whole ones
    found = bits(merged(whole, data), data.test, whole.evaluation)
    assert found["chain"] == found["first"] == found["mean"]


def test_codes_of_a_corpus_put_tokens_of_like_places_near_each_other():
    rng = np.random.default_rng(0)
    # a and b stand in the same places, c and d in others; z never occurs
    text = "".join(rng.choice(["xay", "xby", "pcq", "pdq"]) for _ in range(12_000))
    codes = corpus_codebook(TokenWindows(Letters().encode(text), 36, Letters()), 27, 16, seed=0)
    assert codes.shape == (27, 16) and torch.allclose(codes.norm(dim=1), torch.ones(27))

    def near(one, two):
        return float(codes[ord(one) - 96] @ codes[ord(two) - 96])

    assert near("a", "b") > 0.9 and near("c", "d") > 0.9 and near("a", "c") < 0.5 and abs(near("z", "a")) < 0.9
    again = corpus_codebook(TokenWindows(Letters().encode(text), 36, Letters()), 27, 16, seed=0)
    assert torch.equal(codes, again)
    wide = corpus_codebook(TokenWindows(Letters().encode(text), 36, Letters()), 27, 40, seed=0)
    assert wide.shape == (27, 40) and torch.allclose(wide.norm(dim=1), torch.ones(27))


def test_the_corpus_codebook_is_chosen_by_the_configuration(configure, data):
    orthogonal, corpus = (
        design(configure(f"codebook.source={source}"), data, calibrate).codebook for source in ("orthogonal", "corpus")
    )
    assert orthogonal.shape == corpus.shape == (27, 32)
    gram = corpus @ corpus.T
    assert float((gram - torch.eye(27)).abs().max()) > 0.3


def test_a_corpus_of_images_is_refused():
    config = load_config(
        None,
        [],
        base={**BASE, "model": {"arch": "vit"}, "data": {"source": "digits"}, "codebook": {"source": "corpus"}},
    )
    with pytest.raises(ConfigError, match="codebook.source=corpus counts tokens"):
        design(config, load_data(config), calibrate)
