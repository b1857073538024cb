"""Accuracy of a merged classifier by every readout."""

import torch
from torchmetrics.classification import MulticlassAccuracy

from dbtrain.config import EvaluationConfig
from dbtrain.data.splits import Split
from dbtrain.evaluation.merged import MergedModel, readouts


def accuracy(model: MergedModel, split: Split, section: EvaluationConfig) -> dict[str, float]:
    """Share of samples classified rightly, by readout: ``chain``, ``mean``, ``first``, ``after_<block>``.

    The starting noise of each batch follows from the run's seed, so the result can be repeated.
    """
    classes = int(str(model.blueprint.shape["classes"]))
    metrics: dict[str, MulticlassAccuracy] = {}
    with torch.no_grad():
        for number, start in enumerate(range(0, len(split), section.batch_size)):
            indices = torch.arange(start, min(start + section.batch_size, len(split)))
            batch = split.batch(indices, model.device)
            for name, probabilities in readouts(model.evaluations(batch, number, section.steps_per_block)).items():
                if name not in metrics:
                    metrics[name] = MulticlassAccuracy(classes, average="micro").to(model.device)
                metrics[name].update(probabilities, batch["label"])
    return {name: float(metric.compute()) for name, metric in metrics.items()}
