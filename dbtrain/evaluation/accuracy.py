"""Accuracy of a merged classifier by every readout, and of controls."""

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.splits import Split, mixed, partners
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.method.draws import Draws
from dbtrain.method.interface import Batch
from dbtrain.telemetry.counting import counted

CLASS = "class_"
"""Beginning of the name of a class's score; the name of the class follows."""


def accuracy(model: MergedModel, split: Split, section: EvaluationConfig) -> dict[str, float]:
    """Share of samples classified rightly, by readout: ``chain``,
    ``mean``, ``first``, ``after_<block>``, and controls.

    There are two controls. ``shuffled`` puts every block in the place of its predecessor, and is read out as
    `section.readout` says. ``scrambled`` shows each block the true code, noised as in training, and the image
    of some other sample of the split: the mean of these predictions is what the noisy codes alone give away.

    Behind these comes ``class_<name>`` for every class that the split has:
    the share of its samples that the readout of `section` classifies rightly.

    The starting noise of a sample follows from the run's seed and its number, so the result can be repeated.
    """
    classes = int(str(model.run_plan.shape["classes"]))
    names = model.run_plan.class_names or tuple(map(str, range(classes)))
    hits: dict[str, int] = {}
    right, total = torch.zeros(classes, dtype=torch.int64), torch.zeros(classes, dtype=torch.int64)
    partner = partners(mixed(len(split)))
    batches = torch.split(torch.arange(len(split)), section.batch_size)
    with torch.no_grad():
        for indices in counted(model.count, "batches classified", batches):
            batch, draws = split.batch(indices, model.device), model.draws(indices)
            predicted = readouts(model.evaluations(batch, draws, section.steps_per_block))
            controls = _controls(model, batch, split.batch(partner[indices], model.device), draws, section)
            labels = batch["label"]
            for name, probabilities in {**predicted, **controls}.items():
                hits[name] = hits.get(name, 0) + int((probabilities.argmax(dim=1) == labels).sum())
            hit = predicted[section.readout].argmax(dim=1) == labels
            right = right + labels[hit].cpu().bincount(minlength=classes)
            total = total + labels.cpu().bincount(minlength=classes)
    by_class = {f"{CLASS}{name}": int(right[i]) / int(total[i]) for i, name in enumerate(names) if total[i]}
    return {name: number / len(split) for name, number in hits.items()} | by_class


def _controls(
    model: MergedModel, batch: Batch, others: Batch, draws: Draws, section: EvaluationConfig
) -> dict[str, Tensor]:
    """Class probabilities (N, classes) by control; empty for a model that is shown no noisy code, or if
    controls are switched off."""
    if not section.controls or model.run_plan.distribution["kind"] == "none":
        return {}
    steps = section.steps_per_block
    controls = {"scrambled": readouts(model.on_true_codes(batch, others, draws, steps))["mean"]}
    if len(model.blocks) > 1:
        controls["shuffled"] = readouts(model.evaluations(batch, draws, steps, rotate=1))[section.readout]
    return controls
