"""The sweep finds what was planted, where it was planted, and nothing in what is random."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.errors import ConfigError
from dbtrain.evaluation.sweep import geometry
from dbtrain.evaluation.sweep.concepts import SHIPPED, ConceptSet, concept_sets, order_distances
from dbtrain.evaluation.sweep.hidden import States, same_length
from dbtrain.evaluation.sweep.phases import boundaries
from dbtrain.evaluation.sweep.similarity import cka, compare
from dbtrain.evaluation.sweep.sweep import sweep, verdict
from dbtrain.run.merge import merge
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from tests.unit.small_runs import commit, settled

WEEK = concept_sets(["weekdays"])[0]
LAYERS, PLANTED, WIDTH, OUTCOMES = 12, 7, 48, 60


class Planted:
    """A model whose states are noise up to a layer, and from there on a ring that the answer follows."""

    name, weights = "planted", ""
    layers = list(range(1, LAYERS + 1))

    def __init__(self, seed, ring=True):
        self.seed, self.ring = seed, ring

    def states(self, concepts):
        generator = np.random.default_rng(self.seed)
        count, prompts = len(concepts.labels), concepts.prompts()
        labels, templates = (np.array([prompt[i] for prompt in prompts]) for i in (0, 1))
        turn = 2 * np.pi * np.arange(count) / count
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 6
        hidden = []
        for layer in self.layers:
            means = generator.standard_normal((count, WIDTH))
            if self.ring and layer >= PLANTED:
                means = circle @ np.linalg.qr(generator.standard_normal((WIDTH, 2)))[0].T
            hidden.append(means[labels] + 0.3 * generator.standard_normal((len(labels), WIDTH)))
        means = circle if self.ring else 6 * generator.standard_normal((count, 2))
        logits = (means @ generator.standard_normal((2, OUTCOMES)) * 0.2)[labels]
        chances = np.exp(logits + 0.02 * generator.standard_normal(logits.shape))
        return States(np.stack(hidden, axis=1), chances / chances.sum(1, keepdims=True), labels, templates)

    def first_tokens(self, concepts):
        return [1, 2, 3, 4, 5, 6, 1]


@pytest.fixture(scope="module")
def planted():
    return sweep(Planted(0), [WEEK])


def test_a_planted_ring_is_found_at_its_layer(planted):
    result = planted.sets[0]
    assert result.significant and result.exact and "significant" in verdict(result)
    before, after = result.layers[: PLANTED - 1], result.layers[PLANTED - 1 :]
    assert min(row.r for row in after) > 0.85 > max(row.r for row in before)
    assert max(row.order_p for row in after) < 0.004 and all(row.low <= row.r <= row.high + 0.05 for row in after)
    assert min(row.arc for row in after) > result.arc_band[1]
    assert min(row.probe for row in after) > 0.9
    two = planted.phases[0]
    assert two.after == (PLANTED - 1,) and two.stability[0] > 0.9 > two.chance[0] and two.explained > 0.8


def test_nothing_is_found_in_random_networks():
    found = [sweep(Planted(seed, ring=False), [WEEK]).sets[0] for seed in range(1, 4)]
    assert not any(result.significant for result in found)
    assert all(verdict(result).startswith("not significant") for result in found)


def test_permutations_are_all_tried_where_they_are_few_and_a_ring_can_be_turned():
    ring = order_distances(7, "cyclic")
    found = geometry.mantel(ring, ring, 0)
    assert found.exact and found.r == pytest.approx(1) and found.p == pytest.approx(14 / 5040)
    line = geometry.mantel(order_distances(10, "linear"), order_distances(10, "linear"), 0)
    assert not line.exact and 1 / 5000 <= line.p < 0.01


def test_the_permutation_test_is_right_about_how_often_it_errs():
    generator = np.random.default_rng(0)
    wanted = order_distances(6, "cyclic")
    ps = [geometry.mantel(geometry.distances(generator.standard_normal((6, 20))), wanted, 0).p for _ in range(300)]
    assert np.mean(np.array(ps) <= 0.05) < 0.09 and np.mean(np.array(ps) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_an_arc_of_random_centroids_is_inside_its_band_and_a_ring_is_not():
    generator = np.random.default_rng(1)
    low, high = geometry.arc_band(7, 32, "cyclic", 0)
    random = [geometry.arc(generator.standard_normal((7, 32)), "cyclic") for _ in range(100)]
    assert 0.85 <= np.mean([low <= value <= high for value in random]) <= 1
    turn = 2 * np.pi * np.arange(7) / 7
    assert geometry.arc(np.stack([np.cos(turn), np.sin(turn)], 1), "cyclic") > 0.99 > high
    assert geometry.arc(np.zeros((5, 4)), "linear") is None
    way = geometry._way(generator.standard_normal((7, 64)))
    labelled = np.abs(np.subtract.outer(way[:-1], way[:-1]))
    labelled = np.minimum(labelled, way[-1] - labelled)
    assert geometry.pearson(labelled, order_distances(7, "cyclic")) > 0.97, "ordered by labels, anything fits"


def test_the_curve_of_the_issue_has_its_step_between_12_and_16():
    r = [0.509, 0.348, 0.383, 0.414, 0.649, 0.678, 0.728, 0.854, 0.811, 0.825]
    found = boundaries(np.array(r)[:, None], [], [1, 4, 8, 12, 16, 20, 24, 28, 30, 32], 2)
    assert found.after == (12,) and found.explained > 0.8
    assert boundaries(np.array(r)[:, None], [], list(range(10)), 3) is None, "of so few layers every cut is near"


def test_templates_that_differ_much_do_not_raise_the_interval():
    """Drawn for each label alone, their differences would be in both tables."""
    generator = np.random.default_rng(0)
    labels, templates = (np.array(one) for one in zip(*[(i, t) for i in range(8) for t in range(6)], strict=True))
    shift = 5 * generator.standard_normal((6, 10))[templates]
    one, two = (generator.standard_normal((8, 10))[labels] for _ in range(2))
    found = []
    for draw in geometry.resamples(labels, templates, 0):
        tables = [geometry.distances(geometry.centroids((x + shift)[draw], labels[draw], 8)) for x in (one, two)]
        found.append(geometry.pearson(*tables))
    assert np.ptp(found) < 1e-9, "what all labels share falls out"


def test_cka_is_1_for_turned_states_and_0_for_others_however_few_prompts_there_are():
    generator = np.random.default_rng(3)
    one = generator.standard_normal((20, 200))
    turn = np.linalg.qr(generator.standard_normal((200, 200)))[0]
    assert cka(one, 3 * one @ turn + 5) == pytest.approx(1)
    others = [cka(one, generator.standard_normal((20, 300))) for _ in range(40)]
    assert abs(np.mean(others)) < 0.02 and max(others) < 0.2, "the plain estimate would be above 0.9"
    same, other = sweep(Planted(0), [WEEK], others=[Planted(0), Planted(1)]).beside[:2]
    assert same.cka == pytest.approx([1.0] * LAYERS)
    before, after = slice(0, PLANTED - 1), slice(PLANTED - 1, None)
    assert min(np.subtract(other.cka, other.permuted)[after]) > 0.1, "the ring is the same"
    assert np.mean(other.cka[before]) > 0.7 > 0.1 > max(np.subtract(other.cka, other.permuted)[before])


def test_networks_of_another_depth_are_refused_beside():
    shallow = Planted(1)
    shallow.layers = [1, 2]
    with pytest.raises(ConfigError, match="same depth"):
        compare([Planted(0), shallow], [WEEK])


def test_hellinger_and_spearman():
    chances = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert geometry.hellinger(chances)[0] == pytest.approx([0, 1, np.sqrt(1 - np.sqrt(0.5))])
    table = order_distances(5, "linear")
    assert geometry.spearman(table, table**3) == pytest.approx(1) and geometry.pearson(table, table**3) < 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_whole(name):
    one = concept_sets([name])[0]
    assert one.order in ("cyclic", "linear") and len(one.prompts()) == len(one.labels) * len(one.templates) >= 40


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: a, labels: [a, b, c], templates: ['{}']}", "labels"),
        ("{name: a, labels: [a, b, c, a], templates: ['{}']}", "twice"),
        ("{name: a, labels: [a, b, c, d], templates: ['none']}", "exactly once"),
        ("{name: a, labels: [a, b, c, d], templates: ['{}'], order: round}", "order"),
        ("{name: a, labels: [a, b, c, d], templates: ['{}'], spellings: {e: [f]}}", "no label"),
        ("{name: [", "no YAML"),
    ],
)
def test_a_wrong_set_is_refused_in_words(tmp_path, text, said):
    file = tmp_path / "set.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        concept_sets([str(file)])
    with pytest.raises(ConfigError, match="weekdays"):
        concept_sets([str(tmp_path / "nowhere.yaml")])


def test_spellings_are_more_prompts_of_the_same_label():
    one = ConceptSet(name="s", labels=list("abcd"), templates=["x {}", "y {}"], spellings={"a": ["A"]})
    assert [text for label, _, text in one.prompts() if label == 0] == ["x a", "x A", "y a", "y A"]


def test_prompts_are_read_in_batches_of_one_length():
    assert list(same_length([[1], [1, 2], [3], [4, 5]])) == [[0, 2], [1, 3]]


def test_labels_that_begin_alike_are_refused_where_they_are_the_behaviour():
    with pytest.raises(ConfigError, match="'Monday' and 'Sunday'.*vocabulary"):
        sweep(Planted(0), [WEEK], "concepts")


def test_the_command_sweeps_a_classifier_and_keeps_what_it_found(tmp_path):
    store = settled(tmp_path)
    commit(store)
    merge(Run(store))
    done = CliRunner().invoke(app, ["sweep", store.url])
    assert done.exit_code == 0, done.output
    kept = json.loads(store.read_text("sweep.json"))
    assert kept["sets"][0]["name"] == "classes" and [row["layer"] for row in kept["sets"][0]["layers"]] == [1, 2, 3]
    assert kept["sets"][0]["prompts"] == 240 and not kept["sets"][0]["significant"] and kept["phases"] == []
    assert store.read("sweep.png").startswith(b"\x89PNG")
    assert kept["weights"] == MergedDirectory(store.child("merged")).weights_hash
    refused = CliRunner().invoke(app, ["sweep", store.url, "--concepts", "weekdays"])
    assert refused.exit_code == 2 and "the classes are" in " ".join(refused.output.split())


def test_a_folder_of_transformers_is_swept_without_a_network(tmp_path):
    """A random network: the answer follows the last layer, and there is still no order to find."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word for label, _, text in WEEK.prompts() for word in text.replace(".", " . ").replace(",", " , ").split()}
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(["[UNK]", *sorted(words)])}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "random-gpt2"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    sizes = transformers.GPT2Config(n_layer=8, n_embd=32, n_head=2, vocab_size=len(words) + 1, n_positions=32)
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(sizes).save_pretrained(folder)
    to = tmp_path / "found.json"
    done = CliRunner().invoke(app, ["sweep", str(folder), "--concepts", "weekdays", "--to", str(to)])
    assert done.exit_code == 0, done.output
    kept = json.loads(to.read_text())
    result = kept["sets"][0]
    assert [row["layer"] for row in result["layers"]] == list(range(9)) and kept["phases"][0]["phases"] == 2
    assert not result["significant"] and "weekdays: not significant" in done.output
    last = result["layers"][-1]
    assert last["r"] > 0.7 and last["p"] < 0.05, "which is why r alone is no evidence"
    (folder / "model.safetensors").unlink()
    refused = CliRunner().invoke(app, ["sweep", str(folder)])
    assert refused.exit_code == 2 and "safetensors" in refused.output


@pytest.mark.parametrize("to", ["found.png", "found", "nowhere/found.json"])
def test_a_file_that_would_lose_the_numbers_is_refused_before_anything_is_measured(tmp_path, to, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["sweep", "no-model", "--to", to])
    assert done.exit_code == 2 and f"--to {to}" in done.output and not list(tmp_path.iterdir())
