import math
from pathlib import Path

import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.evaluation.text.generate import GENERATORS
from dbtrain.evaluation.text.generated import _drawn, describe_judge, distinct, entropy, generated
from dbtrain.evaluation.text.judge import Judge
from dbtrain.evaluation.text.mauve import mauve, ngram_features
from dbtrain.models.registry import architecture
from tests.unit.evaluation.test_evaluation_text import CPU, configure, data, merged  # noqa: F401


def judge(folder: Path) -> str:
    """A causal language model on disk whose tokens are characters; it guesses evenly."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(" abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=27, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    model.transformer.wte.weight.data.zero_()
    model.save_pretrained(folder)
    return str(folder)


def test_entropy_and_distinct_2_show_a_text_that_repeats_itself():
    even, same = [0, 1, 2, 3] * 4, [7] * 16
    assert entropy([even]) == pytest.approx(2) and entropy([same]) == 0
    assert entropy([even, same]) == pytest.approx(1)
    assert distinct([even], 2) == pytest.approx(4 / 15) and distinct([same], 2) == pytest.approx(1 / 15)
    assert distinct([[1, 2, 3, 1]], 2) == 1.0 and distinct([[1]], 2) == 0.0


def test_a_judge_that_guesses_evenly_has_the_perplexity_of_its_vocabulary(tmp_path):
    path = judge(tmp_path)
    assert Judge(path, CPU).perplexity(["the cat sat", "on", "a"]) == pytest.approx(27, rel=1e-4)
    assert Judge(path, CPU).features(["the cat sat", "on"]).shape == (2, 8)
    with pytest.raises(ConfigError, match="finds no two tokens"):
        Judge(path, CPU).perplexity(["a", ""])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16], ids=str)
def test_a_judge_reads_in_float32_whatever_precision_its_file_has(tmp_path, kept):
    from transformers import AutoModelForCausalLM

    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    model = AutoModelForCausalLM.from_pretrained(judge(wide)).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for folder, precision in ((wide, torch.float32), (Path(judge(narrow)), kept)):
        # the same numbers in both files: those that the narrow type holds
        model.to(kept).to(precision).save_pretrained(folder)
    texts = ["the cat sat on the mat", "a dog"]
    assert Judge(str(narrow), CPU).perplexity(texts) == Judge(str(wide), CPU).perplexity(texts)
    assert torch.equal(Judge(str(narrow), CPU).features(texts), Judge(str(wide), CPU).features(texts))


def test_a_text_longer_than_the_judge_reads_is_refused_with_its_limit(tmp_path):
    reader = Judge(judge(tmp_path), CPU)
    assert reader.perplexity(["a" * 64]) == pytest.approx(27, rel=1e-4)
    for read in (reader.perplexity, reader.features):
        with pytest.raises(ConfigError, match="evaluation.judge=.* reads at most 64 tokens, and a text has 65"):
            read(["the cat", "a" * 65])


def test_what_is_no_judge_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="evaluation.judge=.*cannot be read") as caught:
        Judge(str(tmp_path / "none"), CPU)
    assert "\n" not in str(caught.value)


def test_perplexity_stands_beside_entropy_and_distinct_2_and_the_same_of_real_texts(configure, data, tmp_path):  # noqa: F811
    config = configure(f"evaluation.judge={judge(tmp_path)}", "evaluation.texts=6")
    model = merged(config, data)
    scores = generated(model, data.test, config.evaluation)
    assert scores["perplexity"] == pytest.approx(27, rel=1e-4) == scores["text_perplexity"]
    assert 2.5 < scores["text_entropy"] < math.log2(24) and 0 < scores["entropy"] < math.log2(24)
    assert {"distinct_2", "text_distinct_2"} <= scores.keys() and len(scores) == 6
    assert generated(model, data.test, config.evaluation) == scores
    assert len(describe_judge(config.evaluation)["judge_sha256"]) == 64
    both = configure(f"evaluation.judge={config.evaluation.judge}", "evaluation.texts=6", "evaluation.mauve=true")
    assert 0 < generated(model, data.test, both.evaluation)["mauve"] <= 1
    without = generated(model, data.test, configure("evaluation.texts=6").evaluation)
    assert without == {name: score for name, score in scores.items() if "perplexity" not in name}


def test_mauve_by_ngrams_tells_texts_of_another_kind_from_those_of_the_same():
    words, rest = [f"the cat sat on mat {n}" for n in range(40)], [f"xyz qqq {n} zzz kkk" for n in range(40)]
    near = mauve(ngram_features(words[::2]), ngram_features(words[1::2]))
    far = mauve(ngram_features(words[::2]), ngram_features(rest[::2]))
    assert 0 <= far < 0.1 and near > 0.5


@pytest.mark.parametrize(
    ("arch", "ranges"), [("masked_lm", "alpha"), ("recurrent", "uniform")], ids=["unmasking", "uncached"]
)
def test_every_language_model_draws_texts_that_differ(configure, data, arch, ranges):  # noqa: F811
    changes = [f"noise.ranges={ranges}", "evaluation.texts=3", "evaluation.steps_per_block=2"]
    config = configure(f"model.arch={arch}", *(["blocks=1"] if arch == "recurrent" else []), *changes)
    model = merged(config, data)
    generate = GENERATORS[architecture(arch).continues]
    rows = _drawn(model, generate, 3, 3)
    # a text is a function of its number, however many are drawn at a time
    assert _drawn(model, generate, 2, 3) == rows
    assert [len(row) for row in rows] == [24] * 3 and len({tuple(row) for row in rows}) == 3
    assert max(map(max, rows)) < 27
    assert 0 < generated(model, data.test, config.evaluation)["entropy"] < math.log2(24)
