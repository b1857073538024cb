"""The sweep of classifiers of images: a folder of transformers, and a merged run of its class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.evaluation.sweep.classifier_folder import SweptClassifier
from dbtrain.evaluation.sweep.concepts import ConceptSet
from dbtrain.evaluation.sweep.sweep import sweep, verdict
from dbtrain.run.merge import merge
from dbtrain.run.run import Run
from dbtrain.shards.merged_directory import MergedDirectory
from tests.unit.models.originals import original
from tests.unit.small_runs import commit, settled

CLASSES, EACH, SIDE, LAYERS, PLANTED = 8, 6, 8, 8, 4
LABELS = [f"turn-{number}" for number in range(CLASSES)]
RING = {"name": "turns", "order": "cyclic", "labels": LABELS, "templates": ["{}"]}


def pictures(folder, ring):
    """A folder for each class: two patterns in shares that are a ring, or patterns that have nothing in common."""
    generator = np.random.default_rng(0)
    patterns = [np.tile(one, (SIDE // 2, SIDE // 2)) for one in ([[1, -1], [1, -1]], [[1, 1], [-1, -1]])]
    for number, label in enumerate(LABELS):
        phase = 2 * np.pi * number / CLASSES
        pattern = (
            np.cos(phase) * patterns[0] + np.sin(phase) * patterns[1]
            if ring
            else generator.uniform(-1, 1, (SIDE, SIDE))
        )
        (folder / label).mkdir(parents=True)
        for copy in range(EACH):
            grey = 127.5 + 80 * pattern + generator.normal(0, 8, (SIDE, SIDE))
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / label / f"{copy}.png")
    return str(folder)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A random ViT, whose class token sees no picture before a layer."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    data = {"patch_size": 2, "image_size": SIDE, "num_channels": 1, "num_labels": CLASSES}
    transformers.set_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **data))
    early = [f".{number}." for number in range(PLANTED - 1)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("o_proj" in name or "attention.output.dense" in name) and any(layer in name for layer in early):
                parameter.zero_()
    folder = tmp_path_factory.mktemp("vit") / "random-vit"
    model.save_pretrained(folder)
    return folder


def told(*arguments):
    done = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_a_ring_of_pictures_is_found_from_the_layer_on_that_sees_them(network, tmp_path):
    concepts = tmp_path / "turns.yaml"
    concepts.write_text(json.dumps(RING))
    to, ring = tmp_path / "found.json", pictures(tmp_path / "ring", ring=True)
    code, said = told(network, "--pictures", ring, "--concepts", concepts, "--to", to)
    assert code == 0 and "turns: significant" in said, said
    result = json.loads(to.read_text())["sets"][0]
    assert [row["layer"] for row in result["layers"]] == list(range(1, LAYERS + 1))
    assert result["prompts"] == CLASSES * EACH
    before, after = result["layers"][: PLANTED - 1], result["layers"][PLANTED - 1 :]
    assert all(row["order_p"] == 1 and row["probe"] < 0.2 for row in before), "the class token is the same for all"
    assert all(row["order_p"] * LAYERS <= 0.05 and row["probe"] > 0.6 for row in after)
    code, said = told(network, "--pictures", ring, "--concepts", concepts, "--behaviour", "concepts")
    assert code == 2 and "'turn-0'" in said and "--behaviour vocabulary" in said


def test_nothing_is_found_in_a_random_network(network, tmp_path):
    model = SweptClassifier(network, pictures(tmp_path / "random", ring=False))
    result = sweep(model, [ConceptSet(**RING)]).sets[0]
    assert not result.significant and verdict(result).startswith("not significant")
    last = result.layers[-1]
    assert last.r > 0.5 and last.p < 0.05, "which is why r alone is no evidence"
    assert model.classes().labels == LABELS and model.classes().order == "none"


def test_pixels_are_scaled_as_the_folder_says(network, tmp_path):
    folder = tmp_path / "white"
    (folder / "all").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(folder / "all" / "a.png")
    assert float(SweptClassifier(network, str(folder))._pictures(np.array([0])).max()) == pytest.approx(1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in network.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.2], "image_std": [0.1]}))
    assert float(SweptClassifier(copy, str(folder))._pictures(np.array([0])).max()) == pytest.approx(8)
    (copy / "preprocessor_config.json").write_text("{")
    code, said = told(copy, "--pictures", folder)
    assert code == 2 and "preprocessor_config.json cannot be read" in said and "Traceback" not in said


def test_what_cannot_be_swept_together_is_refused_in_words(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ring = pictures(tmp_path / "ring", ring=True)
    more = pictures(tmp_path / "more", ring=True)
    (tmp_path / "more/another").mkdir()
    (tmp_path / "more/turn-0/0.png").rename(tmp_path / "more/another/0.png")
    other = tmp_path / "swin"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["SwinForImageClassification"]}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((network / "config.json").read_bytes())
    for arguments, wanted in (
        ([network], "say with --pictures"),
        ([network, "--pictures", "nowhere"], "--pictures nowhere does not exist"),
        (["a-run", "--pictures", ring], "a-run is none: leave it out"),
        ([network, "--pictures", ring, "--beside", "a-run"], "only models that read the same"),
        ([other, "--pictures", ring], "reads ViTForImageClassification alone"),
        ([broken, "--pictures", ring], "holds no ViTForImageClassification"),
        ([network, "--pictures", more], f"has {CLASSES + 1} classes, and random-vit was made for {CLASSES}: give"),
    ):
        code, said = told(*arguments)
        assert code == 2 and wanted in said and "Traceback" not in said, said


def test_a_merged_run_of_a_vit_of_transformers_is_swept(tmp_path):
    pytest.importorskip("transformers")
    original("hf_vit", tmp_path / "pretrained")
    store = settled(tmp_path, model={"arch": "hf_vit", "config": str(tmp_path / "pretrained")})
    commit(store)
    merge(Run(store))
    code, said = told(store.url)
    assert code == 0, said
    kept = json.loads(store.read_text("sweep.json"))
    assert [row["layer"] for row in kept["sets"][0]["layers"]] == [1, 2, 3] and kept["sets"][0]["prompts"] == 240
    assert kept["weights"] == MergedDirectory(store.child("merged")).weights_hash
    numbers = tmp_path / "numbers.yaml"
    labels = [str(number) for number in range(10)]
    numbers.write_text(json.dumps({"name": "digits", "order": "linear", "labels": labels, "templates": ["{}"]}))
    code, said = told(store.url, "--concepts", numbers, "--behaviour", "concepts")
    assert code == 0 and "digits: not significant" in said, said
