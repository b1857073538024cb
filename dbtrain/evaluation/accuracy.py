"""Accuracy of a merged classifier by every readout, and of controls."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dbtrain.config import EvaluationConfig
from dbtrain.data.splits import Split, mixed, partners
from dbtrain.evaluation.merged_model import MergedModel, probabilities, read_out
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
    each = 3 * _size(split.batch(batches[0], model.device))  # its images, those of others, and what is made of both
    with torch.no_grad():
        for group in counted(model.count, "batches classified", model.groups(batches, each)):
            for labels, predicted, controls in _classified(model, split, group, partner, section):
                for name, outcomes in {**predicted, **controls}.items():
                    hits[name] = hits.get(name, 0) + int((outcomes.argmax(dim=1) == labels).sum())
                hit = predicted[section.readout].argmax(dim=1) == labels
                right = right + labels[hit].cpu().bincount(minlength=classes)
                total = total + labels.cpu().bincount(minlength=classes)
    by_class = {f"{CLASS}{name}": int(right[i]) / int(total[i]) for i, name in enumerate(names) if total[i]}
    return {name: number / len(split) for name, number in hits.items()} | by_class


def _size(batch: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in batch.values())


Classified = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""Labels (N,) of a batch, and class probabilities (N, classes) by readout and by control."""


def _classified(
    model: MergedModel, split: Split, group: Sequence[Tensor], partner: Tensor, section: EvaluationConfig
) -> list[Classified]:
    """Batches, given as numbers of samples, that walk down the chain side by side.

    There are no controls for a model that is shown no noisy code, or if they are switched off.
    """
    steps, readout = section.steps_per_block, section.readout
    batches = [(split.batch(indices, model.device), model.draws(indices)) for indices in group]
    walks = [map(probabilities, model.walk(batch, draws, steps)) for batch, draws in batches]
    controlled = section.controls and model.run_plan.distribution["kind"] != "none"
    if controlled:
        others = [split.batch(partner[indices], model.device) for indices in group]
        for (batch, draws), other in zip(batches, others, strict=True):
            walks.append(map(probabilities, model.on_true_codes(batch, other, draws, steps)))
    along = model.side_by_side(walks)
    predicted, scrambled = along[: len(group)], along[len(group) :]
    controls: list[dict[str, Tensor]] = [{} for _ in group]
    for number, numbers in enumerate(scrambled):
        controls[number]["scrambled"] = read_out(numbers)["mean"]
    if controlled and len(model.blocks) > 1:
        turned = [map(probabilities, model.walk(batch, draws, steps, rotate=1)) for batch, draws in batches]
        for number, numbers in enumerate(model.side_by_side(turned)):
            controls[number]["shuffled"] = read_out(numbers)[readout]
    labels = [batch["label"] for batch, _ in batches]
    return [(labels[n], read_out(predicted[n]), controls[n]) for n in range(len(group))]
