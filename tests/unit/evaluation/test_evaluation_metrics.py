from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dbtrain import api, cli
from dbtrain.config import load_config
from dbtrain.errors import ConfigError
from dbtrain.evaluation import report
from dbtrain.evaluation.metrics import METRICS, metric_of
from dbtrain.models.registry import ARCHITECTURES, architecture

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = {"vit": "vit_digits", "ar_lm": "ar_tiny", "masked_lm": "masked_tiny", "recurrent": "recurrent_tiny"}


def asked(arch, metric):
    return load_config(CONFIGS / f"{FILES[arch]}.yaml", [f"evaluation.metric={metric}"])


def test_every_architecture_fits_a_metric_and_every_metric_an_architecture():
    fitting = {arch: [n for n, m in METRICS.items() if m.fits(architecture(arch))] for arch in ARCHITECTURES}
    assert {arch: names[0] for arch, names in fitting.items()} == {
        "vit": "accuracy",
        "dit": "frechet_classifier",
        "ar_lm": "bits",
        "masked_lm": "elbo_bits",
        "recurrent": "bits",
        "hf_vit": "accuracy",
        "hf_dit": "frechet_classifier",
        "hf_llama": "bits",
        "hf_wan": "frechet_classifier",
    }
    assert {name for names in fitting.values() for name in names} == set(METRICS)


def test_an_architecture_that_does_nothing_that_is_measured_is_told_so(monkeypatch):
    class Mute:
        classifies, samples, likelihood, continues = False, None, None, None

    monkeypatch.setitem(ARCHITECTURES, "vit", Mute)
    with pytest.raises(ConfigError, match="model.arch=vit neither classifies, .*: no metric fits it"):
        metric_of(SimpleNamespace(model=SimpleNamespace(arch="vit"), evaluation=SimpleNamespace(metric=None)))


@pytest.mark.parametrize(
    ("arch", "metric", "fitting"),
    [
        ("recurrent", "elbo_bits", "bits, generated"),
        ("masked_lm", "bits", "elbo_bits, generated"),
        ("ar_lm", "accuracy", "bits, generated"),
        ("vit", "frechet_classifier", "accuracy"),
    ],
)
def test_a_metric_of_another_architecture_is_refused_with_those_that_fit(arch, metric, fitting):
    message = f"evaluation.metric={metric} does not fit model.arch={arch}: set it to {fitting}$"
    with pytest.raises(ConfigError, match=message):
        metric_of(asked(arch, metric))


@pytest.mark.parametrize("command", [["train", "--evaluate"], ["compare"], ["ablate"]], ids=lambda words: words[0])
def test_it_is_refused_before_anything_is_trained(command, tmp_path, monkeypatch):
    for module in (cli.training, cli.comparison):
        monkeypatch.setattr(module, "train_and_merge", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("dbtrain.experiments.ablate.run_grid", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    wrong = {"vit_digits": ("bits", "does not fit model.arch=vit"), "dit_digits": ("frechet_inception", "needs eval")}
    for name, (metric, message) in wrong.items():
        arguments = [*command, str(CONFIGS / f"{name}.yaml"), f"evaluation.metric={metric}", f"out={tmp_path}"]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2 and message in result.output
    assert not list(tmp_path.iterdir())


def rows(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_a_comparison_prints_like_beside_like():
    blocks = {"chain": 0.8, "mean": 0.9, "first": 0.7, "after_0": 0.7, "after_1": 0.8, "scrambled": 0.1}
    whole = {"chain": 0.85, "mean": 0.85, "first": 0.85, "after_0": 0.85}
    assert rows(report.comparison(METRICS["accuracy"], blocks, whole, "mean")) == [
        ("mean over the chain (default readout)", "90.00", "85.00"),
        ("last of the chain", "80.00", "85.00"),
        # a part of the blocks has nothing like it in a network without parts
        ("block 0 alone", "70.00", "-"),
        ("after block 0", "70.00", "-"),
        ("after block 1", "80.00", "-"),
        ("control: true codes noised, images of other samples", "10.00", "-"),
    ]


def test_an_evaluation_calls_the_readouts_as_a_comparison_does():
    names = ["chain", "mean", "first", "after_1", "shuffled", "block_2", "total", "heun_50"]
    scores = dict.fromkeys(names, 0.5)
    compared = rows(report.comparison(METRICS["accuracy"], scores, scores, "none of them"))
    evaluated = rows(report.scores_table(METRICS["accuracy"], {"validation": scores, "test": scores}))
    assert [row[0] for row in evaluated] == [row[0] for row in compared]
    assert evaluated[0] == ("last of the chain", "50.00", "50.00")
    assert [row[0] for row in evaluated[3:]] == [
        "after block 1",
        "control: blocks in another order",
        "share of block 2",
        "total",
        "heun_50",
    ]


def test_each_readout_of_generated_texts_says_which_way_is_better():
    scores = {"perplexity": 9.0, "entropy": 3.0, "distinct_2": 0.5, "text_distinct_2": 0.6, "mauve": 0.4}
    directions = {"perplexity": "lower", "distinct_2": "higher", "mauve": "higher"}
    names = [name + (f" ({directions[name]} is better)" if name in directions else "") for name in scores]
    metric = METRICS["generated"]
    for table in (report.comparison(metric, scores, scores, "mean"), report.scores_table(metric, {"test": scores})):
        assert [row[0] for row in rows(table)] == names
    assert rows(report.comparison(metric, scores, {**scores, "mauve": 0.3}, "mean"))[-1][1:] == ("0.4000", "0.3000")
    assert metric.direction("entropy") == METRICS["accuracy"].direction("mean") == ""


def test_train_evaluates_as_this_command_says(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(cli.training, "train_and_merge", lambda *_: True)
    monkeypatch.setattr(api, "evaluate", lambda run, overrides, section, view, shown: told.append(section))
    arguments = ["train", "--evaluate", str(CONFIGS / "vit_digits.yaml"), f"out={tmp_path}", "evaluation.batch_size=7"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert [section.batch_size for section in told] == [7]
