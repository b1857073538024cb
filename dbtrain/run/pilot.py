"""Pilots: one-layer networks that see the context alone, and
what they answer on samples that they did not train on."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dbtrain.config import Config
from dbtrain.data.batching import EpochOrder
from dbtrain.data.splits import DataSet, Split, mixed
from dbtrain.method.draws import derive_seed
from dbtrain.method.gaussian import NoNoise
from dbtrain.method.interface import BlockModel
from dbtrain.method.parametrisation import Unseen
from dbtrain.models.registry import architecture
from dbtrain.telemetry.counting import Count, counted, silent

PILOTS = 2
PILOT_STEPS = 300
PILOT_BATCH = 128
PILOT_LR = 1e-3
ANSWERS = 1024
"""Number of answers that are asked of each pilot."""
FOLDS = 5
"""Number of folds: if the validation split has too few samples, each pilot leaves out another fold of the
training data, at most a fifth of it."""
POSITIONS = 16
"""Positions of a text that are looked at: many texts with a few each tell more than few texts whole."""
PREDICT_BATCH = 256


@dataclass(frozen=True)
class Answers:
    """What the pilots say about held-out samples, a row for each position of each."""

    probabilities: Tensor
    """p(y|x) (n, V) float64."""
    pilot: Tensor
    """Which pilot answered, (n,) int64."""
    sample: Tensor
    """Number of the sample, (n,) int64: rows of one sample are no independent observations."""


@dataclass(frozen=True)
class Part:
    """Some samples of a split."""

    split: Split
    indices: Tensor
    """(n,) int64 on the host."""

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Samples of these indices, as the split itself returns them."""
        return self.split.batch(self.indices[indices], device)


def ask_pilots(config: Config, data: DataSet, codebook: Tensor, count: Count = silent) -> Answers:
    """Train `PILOTS` pilots and ask each about the validation split and,
    if that is small, a fold of the training data.

    The temperature of each is fitted on the same samples: an over-confident pilot would claim
    that nothing is left to decide. A function of its arguments on one kind of hardware.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _repeatable():
        codes = codebook.to(device)
        answers = [_ask_pilot(config, data, codes, device, number, count) for number in range(PILOTS)]
    return Answers(
        torch.cat([probabilities for probabilities, _ in answers]),
        torch.cat([torch.full_like(sample, number) for number, (_, sample) in enumerate(answers)]),
        torch.cat([sample for _, sample in answers]),
    )


@contextmanager
def _repeatable() -> Iterator[None]:
    """Compute the same bits each time on one kind of hardware, as in a worker."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _ask_pilot(
    config: Config, data: DataSet, codebook: Tensor, device: torch.device, number: int, count: Count
) -> tuple[Tensor, Tensor]:
    """p(y|x) (n, V) of one pilot and the samples (n,) that it was asked about."""
    rest, fold = folded(data, number)
    model = _train_pilot(config, data.shape, rest, codebook, device, number, count)
    logits, target, sample = _predict(model, data.validation, device)
    if len(fold):
        more = _predict(model, fold, device)
        logits, target = torch.cat([logits, more[0]]), torch.cat([target, more[1]])
        sample = torch.cat([sample, len(data.validation) + fold.indices[more[2]]])
    return (logits / temperature(logits, target)).softmax(dim=-1), sample


def folded(data: DataSet, number: int) -> tuple[Split, Part]:
    """What a pilot trains on, and what it leaves out of that to be asked about;
    pilots leave out different samples."""
    each = POSITIONS if "vocabulary" in data.shape else 1
    size = min(max(ANSWERS - each * len(data.validation), 0), len(data.train) // FOLDS)
    if not size:
        return data.train, Part(data.train, torch.empty(0, dtype=torch.int64))
    order = mixed(len(data.train)).roll(-number * size)
    return Part(data.train, order[size:]), Part(data.train, order[:size])


def _train_pilot(
    config: Config,
    shape: Mapping[str, object],
    split: Split,
    codebook: Tensor,
    device: torch.device,
    number: int,
    count: Count,
) -> BlockModel:
    kind = architecture(config.model.arch)
    arguments = {**config.model.arguments(), "depth": 1}
    arguments |= kind.from_shape(shape)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, "pilot", number))
        model = kind(noise=NoNoise(kind.per_position), parametrisation=Unseen(), codebook=codebook, **arguments).to(
            device
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=PILOT_LR)
        size = min(PILOT_BATCH, config.training.batch_size)
        order = EpochOrder(len(split), size, derive_seed(config.seed, "pilot order", number))
        for step in counted(count, f"steps of pilot {number + 1} of {PILOTS}", range(PILOT_STEPS)):
            batch = split.batch(order.indices(step, range(size)), device)
            output, target = _output(model, batch)
            loss = functional.cross_entropy(output.flatten(0, -2), target.flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval()


def _output(model: BlockModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    example = model.example(batch)
    level = torch.ones(len(example.clean), *model.noise.level_shape(example), device=example.clean.device)
    nothing = torch.zeros_like(example.clean)
    return model.predict(range(1), nothing, level, example.context), example.target


@torch.no_grad()
def _predict(model: BlockModel, split: Split, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, V), targets (n,) and samples (n,) of about `ANSWERS` samples,
    or of some positions of fewer texts."""
    length = _output(model, split.batch(torch.arange(1), device))[1].numel()
    each = min(POSITIONS, length)
    picked = ((torch.arange(each) + 0.5) * length / each).long().to(device)
    count = min(max(ANSWERS // each, 1), len(split))
    parts = []
    for start in range(0, count, PREDICT_BATCH):
        indices = torch.arange(start, min(start + PREDICT_BATCH, count))
        logits, target = _output(model, split.batch(indices, device))
        own = logits.reshape(len(indices), length, -1)[:, picked], target.reshape(len(indices), length)[:, picked]
        parts.append((own[0].flatten(0, 1).double().cpu(), own[1].flatten().cpu(), indices.repeat_interleave(each)))
    logits, target, sample = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits, target, sample


def temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature of a grid that gives the least cross-entropy."""
    grid = torch.logspace(-1, 1, 81, dtype=torch.float64).tolist()
    return min(grid, key=lambda t: float(functional.cross_entropy(logits / t, target)))
