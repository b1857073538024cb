"""Frechet distance between drawn samples and a split, on the features of a classifier or of Inception."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.config import EvaluationConfig
from dbtrain.data.splits import DataSet, Split, evenly, spread
from dbtrain.errors import ConfigError
from dbtrain.evaluation.images.asked import sample_shape
from dbtrain.evaluation.images.classifier import judge_of
from dbtrain.evaluation.images.inception import Inception
from dbtrain.evaluation.images.sampling import Sampling, draw
from dbtrain.evaluation.merged_model import MergedModel
from dbtrain.method.interface import Batch

Begun = tuple[Callable[[Split], dict[str, float]], dict[str, Any]]
"""Split -> score by readout, and what the scores depend on besides model and data."""

NOISE_SEED = 0
"""Seed of the samples' noise, the same in every run: two models that are compared start from the same
noise."""

CONTROLS = ("first", "shuffled_blocks", "scrambled_class", "training_images")
"""Readouts of drawn samples that stand beside the score, by the names that `distances` explains."""


class Features(nn.Identity):
    """What torchmetrics takes for a network: here the features are made already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_classifier(model: MergedModel, data: DataSet, section: EvaluationConfig) -> Begun:
    """Frechet classifier distance between samples and a split, by readout; see :func:`distances`.

    It depends on the classifier and the sample count: compare it only where both are the same.

    Raises:
        ConfigError: the data has no classes, or is of videos.
    """
    if "classes" not in data.shape or len(sample_shape(model.run_plan)) != 3:
        raise ConfigError(
            "evaluation.metric=frechet_classifier trains a classifier of images, and this data has no classes or is of "
            "videos: look at samples (dbtrain sample RUN) and at the blocks' losses (dbtrain losses RUN)"
        )
    judge = judge_of(data, section.classifier, model.device, model.count)
    depends_on = {"classifier": judge.digest, "classifier_accuracy": judge.accuracy, "samples": section.samples}
    return partial(distances, judge.network, model, section, data.train), depends_on


def frechet_inception(model: MergedModel, data: DataSet, section: EvaluationConfig) -> Begun:
    """FID, on the Inception weights given as ``evaluation.inception``, by readout; see :func:`distances`.

    Raises:
        ConfigError: the images are of other than 1 or 3 channels.
        DataError: the weights cannot be read.
    """
    channels = sample_shape(model.run_plan)[0]
    if channels not in (1, 3):
        raise ConfigError(
            f"evaluation.metric=frechet_inception reads images of 1 or 3 channels, these have {channels}: set it to "
            "frechet_classifier"
        )
    network = Inception(str(section.inception)).to(model.device)
    return partial(distances, network, model, section, data.train), {}


@torch.no_grad()
def distances(
    features: nn.Module, model: MergedModel, section: EvaluationConfig, train: Split, split: Split
) -> dict[str, float]:
    """Distances between samples with a split's classes and all its images, lower being better.

    ``<solver>_<steps>`` is the score. The rest are controls: ``first`` (block 0 alone, in its own slice),
    ``shuffled_blocks`` (each slice by the block of the next), ``scrambled_class`` (at every
    evaluation the classes of other samples), and ``training_images`` (real images instead of samples: the
    floor at these counts).
    """
    distance, labels = _distance_to(split, features, section.batch_size, model.device)
    # taken evenly from the whole split, which may be sorted by class
    classes = labels[spread(len(split), section.samples)]
    scores = {}
    for name, sampling in samplings(model, section).items():
        samples = _drawn(model, classes, name, sampling, section.batch_size)
        scores[name] = distance(torch.split(samples, section.batch_size))
    if section.controls:
        numbers = evenly(len(train), section.samples)
        batches = _batches(train, numbers, section.batch_size, model.device)
        scores["training_images"] = distance(batch["image"] for batch in batches)
    return scores


def _distance_to(
    split: Split, features: nn.Module, size: int, device: torch.device
) -> tuple[Callable[[Iterable[Tensor]], float], Tensor]:
    """The distance of batches of images to all images of a split, and that split's labels (len(split),)."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # three seconds, for every command if it stood above

    metric = FrechetInceptionDistance(Features(int(str(features.num_features))), reset_real_features=False)
    labels = []
    for batch in _batches(split, torch.arange(len(split)), size, device):
        metric.update(features(batch["image"]).cpu(), real=True)
        labels.append(batch["label"])

    def distance(images: Iterable[Tensor]) -> float:
        metric.reset()
        for part in images:
            metric.update(features(part).cpu(), real=False)
        return float(metric.compute())

    return distance, torch.cat(labels)


def _drawn(model: MergedModel, classes: Tensor, name: str, sampling: Sampling, size: int) -> Tensor:
    """Samples of these classes (N,), within the bounds that images of the data have."""
    run_plan = model.run_plan
    count = partial(model.count, f"levels of {len(classes):,} samples, {name}")
    shape, walks = sample_shape(run_plan), model.blocks.walks
    model.blocks.expect(min(size, len(classes)))
    samples = draw(run_plan, model.blocks.__getitem__, classes, shape, sampling, size, count, walks=walks)
    # pixels end at black and white; latents have no bounds
    return samples if "latent_scale" in run_plan.shape else samples.clamp(-1, 1)


def samplings(model: MergedModel, section: EvaluationConfig) -> dict[str, Sampling]:
    """How samples are drawn for each readout, the score first."""
    ranges = model.run_plan.ranges
    score = replace(Sampling.of(model.run_plan, section, NOISE_SEED), blend=section.blend)
    suffix = ("" if section.guidance == 1 else f"_guided_{section.guidance:g}") + ("_blended" if section.blend else "")
    named = {f"{section.solver}_{section.steps}{suffix}": score}
    if section.controls and ranges.blocks > 1:
        owners = ranges.block_of(torch.tensor(score.levels, dtype=torch.float64)).tolist()
        first = tuple(level for level, owner in zip(score.levels, owners, strict=True) if owner == 0)
        named["first"] = replace(score, levels=first)
        named["shuffled_blocks"] = replace(score, order=(*range(1, ranges.blocks), 0))
    if section.controls:
        named["scrambled_class"] = replace(score, scrambled=True)
    return named


def _batches(split: Split, numbers: Tensor, size: int, device: torch.device) -> Iterator[Batch]:
    for indices in torch.split(numbers, size):
        yield split.batch(indices, device)
