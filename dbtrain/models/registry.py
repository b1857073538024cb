"""Which architectures there are, and what each needs from outside itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dbtrain.errors import ConfigError
from dbtrain.method.interface import BlockModel, Noised
from dbtrain.models.ar_lm import ARLM, end_to_end_lm
from dbtrain.models.dit import DiT
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.models.recurrent import Recurrent
from dbtrain.models.vit import ViT


@dataclass(frozen=True)
class Architecture:
    """One row of the table: how to build it and what it takes."""

    build: Callable[..., BlockModel]
    codes: str | None
    """Entry of the data's shape that says how many codes the codebook has; None without a codebook."""
    takes: tuple[str, ...]
    """Entries of the data's shape that the model takes as arguments."""
    noise: str
    """Its natural noise process: a row of `NOISE_PROCESSES`."""
    end_to_end: Literal["no_noise", "same_noise"]
    """What the end-to-end baseline denoises: nothing (a classifier), or the same targets with one block."""
    metric: str
    """By which a merged model is evaluated: an entry of evaluation/metrics.py."""
    parametrisation: str = "logits"
    """What its input, output and time are: a row of `PARAMETRISATIONS`."""
    noised: Noised = "vectors"
    """What is made noisy."""
    per_position: bool = False
    """Whether each position of a sample has a noise level of its own."""
    generates: str | None = None
    """How a merged model continues a text: an entry of evaluation/generate.py; None if it does not."""
    samples: str | None = None
    """Entry of the data's shape that a sample drawn from noise has; None if there is nothing to draw."""
    build_whole: Callable[..., BlockModel] | None = None
    """What the end-to-end baseline trains, if not the same."""
    whole_start: float = 0.0
    """Spread of the noise that the end-to-end baseline starts from under `no_noise`."""
    most_blocks: int | None = None
    """Into how many blocks it can be cut; None for any number."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "vit": Architecture(
        ViT, codes="classes", takes=("image",), noise="gaussian", end_to_end="no_noise", metric="accuracy"
    ),
    "dit": Architecture(
        DiT,
        codes=None,
        takes=("image", "classes"),
        parametrisation="edm",
        noise="gaussian",
        end_to_end="same_noise",
        metric="frechet_classifier",
        samples="image",
    ),
    "ar_lm": Architecture(
        ARLM,
        codes="vocabulary",
        takes=(),
        noise="gaussian",
        end_to_end="no_noise",
        metric="bits",
        per_position=True,
        generates="cached",
        build_whole=end_to_end_lm,
    ),
    "masked_lm": Architecture(
        MaskedLM,
        codes=None,
        takes=("vocabulary",),
        noise="masking",
        noised="tokens",
        parametrisation="tokens",
        end_to_end="same_noise",
        metric="elbo_bits",
        generates="unmasking",
    ),
    "recurrent": Architecture(
        Recurrent,
        codes="vocabulary",
        takes=(),
        noise="gaussian",
        end_to_end="no_noise",
        metric="bits",
        generates="uncached",
        build_whole=partial(Recurrent, unrolled=True),
        whole_start=1.0,
        most_blocks=1,
    ),
}


def architecture(name: str) -> Architecture:
    """Look an architecture up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"model.arch={name!r} is none of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
