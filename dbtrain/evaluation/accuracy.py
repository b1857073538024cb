"""Accuracy of a merged classifier by every readout, and of controls."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from dbtrain.config import EvaluationConfig
from dbtrain.data.splits import Split
from dbtrain.evaluation.merged import MergedModel, readouts


def accuracy(model: MergedModel, split: Split, section: EvaluationConfig) -> dict[str, float]:
    """Share of samples classified rightly, by readout: ``chain``, ``mean``, ``first``, ``after_<block>``, and controls.

    The controls: ``shuffled``, read out as `section.readout` says, has every block in the place of its predecessor;
    ``scrambled`` shows each block the true code, noised as in training, and another sample's image, so that the mean of
    the predictions is what the noisy codes alone give away.

    The starting noise of each batch follows from the run's seed, so the result can be repeated.
    """
    classes = int(str(model.blueprint.shape["classes"]))
    metrics: dict[str, MulticlassAccuracy] = {}
    with torch.no_grad():
        for number, start in enumerate(range(0, len(split), section.batch_size)):
            indices = torch.arange(start, min(start + section.batch_size, len(split)))
            batch = split.batch(indices, model.device)
            predicted = readouts(model.evaluations(batch, number, section.steps_per_block))
            for name, probabilities in {**predicted, **_controls(model, batch, number, section)}.items():
                if name not in metrics:
                    metrics[name] = MulticlassAccuracy(classes, average="micro").to(model.device)
                metrics[name].update(probabilities, batch["label"])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _controls(
    model: MergedModel, batch: Mapping[str, Tensor], number: int, section: EvaluationConfig
) -> dict[str, Tensor]:
    """Class probabilities (N, classes) by control; none for a model that is shown no noisy code, or if switched off."""
    if not section.controls or model.blueprint.distribution["kind"] == "none":
        return {}
    steps = section.steps_per_block
    others = {name: values.roll(1, 0) for name, values in batch.items()}
    controls = {"scrambled": readouts(model.on_true_codes(batch, others, number, steps))["mean"]}
    if len(model.blocks) > 1:
        controls["shuffled"] = readouts(model.evaluations(batch, number, steps, rotate=1))[section.readout]
    return controls
