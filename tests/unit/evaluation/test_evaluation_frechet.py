import dataclasses

import numpy as np
import pytest
import torch

from dbtrain.config import EvaluationConfig, load_config
from dbtrain.data.splits import LabelledImages, evenly
from dbtrain.errors import ConfigError, DataError, ShardError
from dbtrain.evaluation.images import classifier as room
from dbtrain.evaluation.images import frechet, inception
from dbtrain.evaluation.images.classifier import Classifier, accuracy_of, fit, judge_of
from dbtrain.evaluation.images.frechet import distances, samplings
from dbtrain.evaluation.images.inception import Inception
from dbtrain.evaluation.loading import all_blocks
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.evaluation.metrics import METRICS, metric_of
from dbtrain.method.split import global_name
from dbtrain.run.make_plan import design
from dbtrain.run.plan import load_data

SMALL = {
    "name": "toy",
    "blocks": 2,
    "model": {"arch": "dit", "depth": 2, "dim": 16, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return load_data(load_config(None, base=SMALL))


@pytest.fixture(scope="module")
def model(data):
    """A run that has not been trained: it denoises as if pixels were N(0, 0.5^2)."""
    run_plan = design(load_config(None, base=SMALL), data, lambda *_: {})

    def load(block):
        return {global_name(block, n): t for n, t in run_plan.model(block).state_dict().items()}

    return MergedModel(run_plan, all_blocks(run_plan, load, CPU), CPU)


class Pixels(torch.nn.Module):
    """A few pixels are the features."""

    num_features = 4

    def forward(self, images):
        return images[:, 0, 2:4, 3:5].flatten(1)


def moments(images):
    features = Pixels()(images).double()
    return features.mean(dim=0), features.T.cov()


def closed_form(one, two):
    """Frechet distance of two Gaussians by a symmetric square root, in NumPy."""
    (m1, c1), (m2, c2) = [(m.numpy(), c.numpy()) for m, c in (moments(one), moments(two))]
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root)).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross


def test_the_distance_is_that_of_two_gaussians(model, data, monkeypatch):
    drawn = []
    real_draw = frechet.draw
    monkeypatch.setattr(frechet, "draw", lambda *args, **walks: drawn.append(real_draw(*args, **walks)) or drawn[-1])
    scores = distances(Pixels(), model, EvaluationConfig(samples=300, steps=6, batch_size=128), data.train, data.test)
    assert list(scores) == ["heun_6", "first", "shuffled_blocks", "scrambled_class", "training_images"]
    test = data.test.batch(torch.arange(len(data.test)), CPU)["image"]
    train = data.train.batch(evenly(len(data.train), 300), CPU)["image"]
    assert scores["heun_6"] == pytest.approx(closed_form(test, drawn[0].clamp(-1, 1)), rel=1e-4)
    assert scores["training_images"] == pytest.approx(closed_form(test, train), rel=1e-3)
    assert scores["training_images"] < 0.5 * scores["heun_6"]


@pytest.mark.parametrize("samples", [90, 500])
def test_samples_have_the_classes_of_a_split_that_is_sorted_and_every_model_the_same_noise(
    model, data, monkeypatch, samples
):
    by_class = data.test.labels.argsort(stable=True)
    split = LabelledImages(data.test.images[by_class], data.test.labels[by_class], 10, 16.0)
    seen = []

    def watched(run_plan, block_at, labels, shape, plan, batch_size, count, walks):
        seen.append((labels, plan.seed))
        return torch.rand(len(labels), *shape)

    monkeypatch.setattr(frechet, "draw", watched)
    distances(Pixels(), model, EvaluationConfig(samples=samples, steps=6), data.train, split)
    expected = split.labels.bincount() * samples / len(split)
    assert len(seen) == 4 and all((told.bincount() - expected).abs().max() <= 1 and seed == 0 for told, seed in seen)


def test_the_training_images_are_of_all_classes_of_a_split_that_is_sorted(model, data, monkeypatch):
    seen = []

    class Watched(LabelledImages):
        def batch(self, indices, device):
            seen.extend(self.labels[indices].tolist())
            return super().batch(indices, device)

    by_class = data.train.labels.argsort(stable=True)
    train = Watched(data.train.images[by_class], data.train.labels[by_class], 10, 16.0)
    monkeypatch.setattr(frechet, "draw", lambda _, __, labels, shape, *___, **____: torch.rand(len(labels), *shape))
    distances(Pixels(), model, EvaluationConfig(samples=50, steps=6), train, data.test)
    assert len(seen) == 50 and set(seen) == set(range(10))


def test_readouts_say_how_samples_were_drawn(model):
    def names(**section):
        return list(samplings(model, EvaluationConfig(steps=8, **section)))

    assert names(controls=False) == ["heun_8"]
    assert names(solver="euler", guidance=1.5, controls=False) == ["euler_8_guided_1.5"]
    assert names(blend=True, controls=False) == ["heun_8_blended"]
    every = samplings(model, EvaluationConfig(steps=8, spacing="slices"))
    assert every["first"].levels == every["heun_8"].levels[:4]
    assert every["shuffled_blocks"].order == (1, 0)


def test_one_block_has_no_order_to_shuffle(model, data):
    config = load_config(None, base={**SMALL, "blocks": 1})
    whole = MergedModel.__new__(MergedModel)
    whole.run_plan = design(config, data, lambda *_: {})
    assert list(samplings(whole, EvaluationConfig(steps=8))) == ["heun_8", "scrambled_class"]


def test_the_recipe_learns_digits_and_repeats_bit_by_bit(data, monkeypatch):
    monkeypatch.setattr(room, "STEPS", 40)
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        network = Classifier(1, 10)
        fit(network, data.train, CPU)
        states.append(network.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert accuracy_of(network, data.test, CPU) > 0.6


def test_a_classifier_is_trained_once_for_a_data_set_and_can_be_given(data, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "STEPS", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = judge_of(data, None, CPU)
    [kept] = (tmp_path / "dbtrain").iterdir()
    monkeypatch.setattr(room, "fit", lambda *_: pytest.fail("trained again"))
    again, given = judge_of(data, None, CPU), judge_of(data, str(kept), CPU)
    assert first.digest == again.digest == given.digest and 0 <= first.accuracy == again.accuracy <= 1
    images = data.test.batch(torch.arange(5), CPU)["image"]
    assert torch.equal(first.network(images), given.network(images)) and first.network(images).shape == (5, 128)
    other = dataclasses.replace(data, shape={"image": (3, 8, 8), "classes": 10})
    with pytest.raises(ShardError, match=r"no classifier of images of 3 channel\(s\) in 10 classes"):
        judge_of(other, str(kept), CPU)
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(ShardError, match="classifier"):
        judge_of(data, None, CPU)
    with pytest.raises(ShardError, match="absent"):
        judge_of(data, str(tmp_path / "absent.safetensors"), CPU)


def test_the_metric_is_never_called_fid_without_inception():
    config = load_config(None, base=SMALL)
    name, metric = metric_of(config)
    assert (name, metric.label, metric.better) == ("frechet_classifier", "Frechet classifier distance", "lower")
    assert [name for name, row in METRICS.items() if "FID" in row.label] == ["frechet_inception"]
    with pytest.raises(
        ConfigError, match="evaluation.metric='fid' is none of accuracy, .*frechet_classifier, frechet_inception"
    ):
        metric_of(load_config(None, ["evaluation.metric=fid"], base=SMALL))


def fid(*overrides, **changes):
    return load_config(None, ["evaluation.metric=frechet_inception", *overrides], base={**SMALL, **changes})


def test_what_fid_needs_is_looked_at_before_anything_is_trained(tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    latents = {"source": "latents", "path": "latents.safetensors", "classes": 10}
    with pytest.raises(ConfigError, match="data.source=latents holds none: set it to frechet_classifier"):
        metric_of(fid(f"evaluation.inception={weights}", data=latents))
    for installed in (None, object()):
        monkeypatch.setattr(inception, "find_spec", {"torch_fidelity": installed}.__getitem__)
        if installed:
            assert metric_of(fid(f"evaluation.inception={weights}"))[1].label == "FID"
        else:
            with pytest.raises(ConfigError, match="pip install torch-fidelity"):
                metric_of(fid(f"evaluation.inception={weights}"))


def test_fid_of_images_of_four_channels_is_refused_in_one_line(model, data, monkeypatch):
    monkeypatch.setattr(frechet, "sample_shape", lambda _: (4, 8, 8))
    with pytest.raises(ConfigError, match="1 or 3 channels, these have 4"):
        frechet.frechet_inception(model, data, fid().evaluation)


def test_inception_weights_are_asked_for_and_never_a_pickle(tmp_path):
    for asked, found in ([], "None"), (["evaluation.inception=/absent.safetensors"], "'/absent.safetensors'"):
        with pytest.raises(ConfigError, match=f"needs evaluation.inception, a safetensors file: {found} is none"):
            metric_of(fid(*asked))
    with pytest.raises(DataError, match="never read"):
        Inception(str(tmp_path / "weights.pth"))
