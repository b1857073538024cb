"""What a merged model says of pictures or of a text that is in no data set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from dbtrain.data.pixels import Want, pixels
from dbtrain.data.tokenizers import load_tokenizer
from dbtrain.errors import ConfigError, DataError
from dbtrain.evaluation.merged_model import MergedModel, readouts
from dbtrain.evaluation.text.bits import chances, negative_log, text_groups
from dbtrain.evaluation.text.elbo import block_nats
from dbtrain.models.registry import ARCHITECTURES, architecture

Fit = str | None
"""How a picture of another size is brought to the model's: `crop`, `pad` or `squash`; None refuses it."""
LEVELS = 64
"""Levels of each block at which a masked model's bound is measured."""


@dataclass(frozen=True)
class TextScore:
    """How likely a text is."""

    tokens: int
    characters: int
    bits: float
    """Bits of the whole text."""
    bound: bool
    """Whether the bits are an upper bound."""

    def line(self) -> str:
        """The score in words."""
        about = "at most " if self.bound else ""
        each = [f"{self.bits / count:.4f}" for count in (self.tokens, max(1, self.characters))]
        return (
            f"{self.tokens} tokens, {self.characters} characters: {about}{self.bits:.2f} bits, {each[0]} bits a token, "
            f"{each[1]} bits a character"
        )


@torch.no_grad()
def classify_files(model: MergedModel, files: Sequence[str], fit: Fit = None) -> Tensor:
    """Probabilities (N, classes) of picture files, by the readout of the run.

    Args:
        model: a merged classifier.
        files: their paths.
        fit: how a picture of another size or other colours is brought to the model's; None refuses it.

    Raises:
        ConfigError: the architecture does not classify pictures.
        DataError: a file is missing, no picture, or does not fit.
    """
    config = model.run_plan.config
    kind = architecture(config.model.arch)
    if not kind.classifies or "image" not in model.run_plan.shape:
        able = ", ".join(name for name in ARCHITECTURES if architecture(name).classifies)
        raise ConfigError(f"model.arch={config.model.arch} does not classify pictures; these do: {able}")
    images = _pictures(model, files, fit).to(model.device)
    batch = {"image": images, "label": torch.zeros(len(files), dtype=torch.int64, device=model.device)}
    draws = model.draws(torch.arange(len(files)))
    section = config.evaluation
    probabilities: Tensor = readouts(model.evaluations(batch, draws, section.steps_per_block))[section.readout]
    return probabilities


def _pictures(model: MergedModel, files: Sequence[str], fit: Fit) -> Tensor:
    """Pictures (N, C, H, W) float32 in [-1, 1], white being 1, as the model was trained on them."""
    read, wrong = [], []
    for file in files:
        try:
            read.append(_picture(model, file, fit))
        except DataError as error:
            wrong.append(error)
    if wrong:
        more = f"; {len(wrong) - 1} more of {len(files)} pictures cannot be taken either" if len(wrong) > 1 else ""
        raise DataError(f"{wrong[0]}{more}")
    return torch.from_numpy(np.stack(read)).float() * (2 / 255) - 1


def _picture(model: MergedModel, file: str, fit: Fit) -> np.ndarray:
    shape: tuple[int, int, int] = tuple(model.run_plan.shape["image"])
    if not Path(file).is_file():
        raise DataError(f"{file} is no file: check the path")
    if shape[0] not in (1, 3):
        raise DataError(f"{file}: the model takes samples of {shape[0]} channels, which no picture has")
    picture = pixels(file, file, _want(model, fit))
    if picture.shape == shape:
        return picture
    sizes = [f"{s[2]}x{s[1]} (width x height) of {s[0]} channel(s)" for s in (picture.shape, shape)]
    raise DataError(
        f"{file} is {sizes[0]}, and the model takes {sizes[1]}: bring it to that, or say how, as --fit crop, pad or "
        "squash"
    )


def _want(model: MergedModel, fit: Fit) -> Want:
    """How a picture is brought to the model's shape: as the run's data were; with `fit`, any picture is."""
    data = model.run_plan.config.data.model_dump()
    size, channels, resize, background = (data.get(key) for key in ("size", "channels", "resize", "background"))
    shape = model.run_plan.shape["image"]
    if fit is not None:
        return Want(tuple(shape[1:]), fit, shape[0], background or "black")  # type: ignore[arg-type]
    return Want(tuple(shape[1:]) if size is not None else None, resize, channels, background)


def classes_table(model: MergedModel, file: str, probabilities: Tensor, top: int) -> Table:
    """The likeliest `top` classes of one picture, from probabilities (classes,)."""
    table = Table("class", "probability %", title=escape(file), title_justify="left")
    names = model.run_plan.class_names or tuple(map(str, range(len(probabilities))))
    for number in probabilities.argsort(descending=True, stable=True)[:top].tolist():
        table.add_row(escape(names[number]), f"{100 * float(probabilities[number]):.2f}")
    return table


@torch.no_grad()
def score_text(model: MergedModel, text: str) -> TextScore:
    """The bits of a text under a language model; a text longer than the model's window is read in pieces.

    Each piece is scored without seeing the pieces before it. A masked model gives an upper bound, the ELBO.

    Raises:
        ConfigError: the architecture gives no likelihood.
        DataError: the text has no token.
    """
    config = model.run_plan.located()
    likelihood = architecture(config.model.arch).likelihood
    if likelihood is None:
        able = ", ".join(name for name in ARCHITECTURES if architecture(name).likelihood)
        raise ConfigError(f"model.arch={config.model.arch} is no language model; these are: {able}")
    name = config.data.model_dump()["tokenizer"]
    tokenizer = load_tokenizer(name)
    tokens = tokenizer.encode(text).tolist()
    if not tokens:
        raise DataError(f"--text {text!r} has no token under data.tokenizer={name}: give another text")
    window = int(model.run_plan.shape["length"])
    pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    measure = _next_token_nats if likelihood == "next_token" else _bound_nats
    nats = sum(measure(model, [torch.tensor([piece], device=model.device) for piece in pieces]))
    return TextScore(len(tokens), tokenizer.characters(tokens), nats / math.log(2), likelihood == "elbo")


def _next_token_nats(model: MergedModel, pieces: Sequence[Tensor]) -> list[float]:
    """Negative log-likelihood of each piece (1, L) of a text in nats, by the readout of the run; the noise of
    a piece, if there is any, is drawn from its number."""
    readout = model.run_plan.config.evaluation.readout
    nats: list[float] = []
    for group in text_groups(model, pieces):
        texts = [(tokens, model.draws(torch.tensor([len(nats) + at]))) for at, tokens in enumerate(group)]
        nats += [negative_log(by_readout[readout]) for by_readout in chances(model, texts)]
    return nats


def _bound_nats(model: MergedModel, pieces: Sequence[Tensor]) -> list[float]:
    """The ELBO of each piece (1, L) of a text: the sum of the blocks' shares."""
    shares = [
        torch.cat([block_nats(model, block, {"tokens": p}, torch.tensor([at]), LEVELS) for at, p in enumerate(pieces)])
        for block in range(len(model.blocks))
    ]
    return torch.stack(shares).sum(dim=0).tolist()
