"""Hidden states of a merged run along its chain, and what it says next: one walk for each prompt or image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dbtrain.data.labels import listed
from dbtrain.data.packed import TokenWindows
from dbtrain.errors import ConfigError
from dbtrain.evaluation.opening import open_run
from dbtrain.evaluation.sweep.concepts import LEAST, ConceptSet
from dbtrain.evaluation.sweep.geometry import Floats
from dbtrain.method.interface import BlockModel
from dbtrain.models.registry import architecture
from dbtrain.run.run import Run

BATCH = 32
"""Prompts of the same length that are read at once."""
IMAGES = 24
"""Test images that are read of each class."""


@dataclass(frozen=True)
class States:
    """What a model made of the prompts of one concept set."""

    hidden: Floats
    """(prompts, layers, width), at the place where the model goes on."""
    chances: Floats
    """(prompts, outcomes): the distribution that the model gives there."""
    labels: NDArray[np.int64]
    """(prompts,) number of the label."""
    templates: NDArray[np.int64]
    """(prompts,) number of the template, or of the image within its class."""
    paired: bool = True
    """Whether all labels stand in the same templates."""


class Swept(Protocol):
    """A model that can be swept."""

    name: str
    layers: list[int]
    """Numbers of the layers in `States.hidden`."""
    weights: str
    """Hash of a run's merged model; '' of any other."""

    def states(self, concepts: ConceptSet) -> States:
        """Read all prompts of a set."""

    def first_tokens(self, concepts: ConceptSet) -> list[int]:
        """Number of the outcome (token or class) that each label begins with."""


def same_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of prompts, in batches of one length, so that none is padded."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for _, group in groupby(order, key=lambda number: len(prompts[number])):
        numbers = list(group)
        yield from (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))


class SweptRun:
    """A merged run: an autoregressive language model, or a classifier of images.

    The states are those of the slot from which the answer is read: the last slot of a text, or the token of
    an image that holds the code (of `hf_vit` the class token, to which it is added). They are taken along the
    chain, each block at its own level, as the model is used.

    Raises:
        ConfigError: its architecture neither continues texts nor classifies.
        ShardError: the run is not merged, or damaged.
    """

    def __init__(self, run: Run) -> None:
        self.model = open_run(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.plan = self.model.run_plan
        self.name, self.weights = self.plan.config.name, self.model.weights_hash
        kind = architecture(self.plan.config.model.arch)
        self.text = kind.likelihood == "next_token"
        if not self.text and not kind.classifies:
            raise ConfigError(
                f"model.arch={self.plan.config.model.arch} neither predicts a next token nor classifies: dbtrain sweep "
                "has no behaviour to compare its layers with"
            )
        self.layers = list(range(1, self.plan.config.model.depth + 1))
        self.data = self.plan.data()

    def classes(self) -> ConceptSet:
        """The classes of a classifier as a concept set without an order, whose prompts are test images.

        Raises:
            ConfigError: there are too few classes.
        """
        return class_set(self._names(), self.name)

    def _names(self) -> list[str]:
        return list(self.plan.class_names) or [str(n) for n in range(int(self.plan.shape["classes"]))]

    def states(self, concepts: ConceptSet) -> States:
        """Read the prompts of a set, or the test images of the classes that it names."""
        return self._texts(concepts) if self.text else self._images(concepts)

    def first_tokens(self, concepts: ConceptSet) -> list[int]:
        """Number of each label's first token; for a classifier, the numbers of the classes."""
        if not self.text:
            return [self._names().index(label) for label in concepts.labels]
        return [int(self._tokenizer().encode(f" {label}")[0]) for label in concepts.labels]

    def _tokenizer(self) -> Any:
        split = self.data.test
        assert isinstance(split, TokenWindows), "an architecture with likelihoods reads texts"
        return split.tokenizer

    def _texts(self, concepts: ConceptSet) -> States:
        prompts = concepts.prompts()
        tokens = [[int(token) for token in self._tokenizer().encode(text)] for _, _, text in prompts]
        longest, window = max(map(len, tokens)), int(self.plan.shape["length"])
        if longest >= window:
            raise ConfigError(f"a prompt of {concepts.name} has {longest} tokens, and {self.name} reads {window - 1}")
        hidden: dict[int, Floats] = {}
        chances: dict[int, Floats] = {}
        for numbers in same_length(tokens):
            # one slot is added: its answer is what follows the prompt, and its own token is not looked at
            batch = {"tokens": torch.tensor([[*tokens[n], 0] for n in numbers], device=self.model.device)}
            states, output = self._walk(batch, len(numbers))
            for place, number in enumerate(numbers):
                hidden[number] = states[place]
                chances[number] = output[place, -1]
        return stacked(hidden, chances, prompts)

    def _images(self, concepts: ConceptSet) -> States:
        names, split = self._names(), self.data.test
        every = split.batch(torch.arange(len(split)), torch.device("cpu"))["label"]

        def read(number: int) -> tuple[Floats, Floats]:
            chosen = torch.nonzero(every == number).flatten()[:IMAGES]
            if not len(chosen):
                raise ConfigError(f"the test split of {self.name} has no image of the class {names[number]!r}")
            return self._walk(split.batch(chosen, self.model.device), len(chosen))

        return of_classes(concepts, names, read)

    @torch.no_grad()
    def _walk(self, batch: dict[str, Tensor], count: int) -> tuple[Floats, Floats]:
        """(states (n, layers, width), distributions (n, ..., outcomes)) of one batch along the chain."""
        seen: dict[int, Tensor] = {}
        with _watched(self.model.blocks.shells, seen, -1 if self.text else 0):
            evaluations = self.model.evaluations(batch, self.model.draws(torch.arange(count)))
        output = evaluations[-1].output.float().softmax(dim=-1)
        states = torch.stack([seen[layer - 1] for layer in self.layers], dim=1)
        return states.double().cpu().numpy(), output.double().cpu().numpy()


@contextmanager
def _watched(blocks: Sequence[BlockModel], seen: dict[int, Tensor], slot: int) -> Iterator[None]:
    """Keep the output of every layer at one slot; if a layer is applied more than once, the last output."""

    def keep(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            # before transformers 4.5x its layers gave tuples
            seen[layer] = (output[0] if isinstance(output, tuple) else output)[:, slot].float()

        return hook

    handles = [
        layer.register_forward_hook(keep(int(number))) for block in blocks for number, layer in block.layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def class_set(names: Sequence[str], of: str) -> ConceptSet:
    """The classes of images as a concept set without an order.

    Raises:
        ConfigError: `of`, the model, has too few of them.
    """
    if len(names) < LEAST:
        raise ConfigError(f"{of} has {len(names)} classes: a sweep needs at least {LEAST}")
    return ConceptSet(name="classes", labels=list(names), order="none", templates=["{}"])


def of_classes(concepts: ConceptSet, names: Sequence[str], read: Callable[[int], tuple[Floats, Floats]]) -> States:
    """What a model made of the images of those classes that a concept set names.

    Args:
        concepts: its labels are names of classes.
        names: names of all classes that there are images of.
        read: number of a class -> (states (n, layers, width), answers (n, outcomes)) of n images of it.

    Raises:
        ConfigError: a label is no class.
    """
    if unknown := [label for label in concepts.labels if label not in names]:
        raise ConfigError(f"{concepts.name} has the label {unknown[0]!r}: the classes are {listed(names)}")
    hidden: dict[int, Floats] = {}
    chances: dict[int, Floats] = {}
    prompts: list[tuple[int, int, str]] = []
    for number, label in enumerate(concepts.labels):
        states, output = read(names.index(label))
        for place in range(len(states)):
            hidden[len(prompts)], chances[len(prompts)] = states[place], output[place]
            prompts.append((number, place, label))
    return stacked(hidden, chances, prompts, paired=False)


def stacked(
    hidden: dict[int, Floats],
    chances: dict[int, Floats],
    prompts: Sequence[tuple[int, int, str]],
    paired: bool = True,
) -> States:
    """What was read of each prompt, by its number, in one table.

    Args:
        hidden: hidden states of every layer.
        chances: answers, as probabilities.
        prompts: label, template and text of each.
        paired: as of `States`.
    """
    count = range(len(prompts))
    return States(
        hidden=np.stack([hidden[n] for n in count]),
        chances=np.stack([chances[n] for n in count]),
        labels=np.array([label for label, _, _ in prompts]),
        templates=np.array([template for _, template, _ in prompts]),
        paired=paired,
    )
