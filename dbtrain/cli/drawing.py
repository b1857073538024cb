"""Options of the sample command; those of how to draw take the place of keys of the run's section
`evaluation`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dbtrain.config.evaluation import AnySolver

OF_EVAL = "the run's evaluation."
"""Begins the name of a key in the help of the option that takes its place."""

Out = Annotated[
    Path | None,
    typer.Option(
        help="A .png for a grid of pictures, or a .npy for the samples; by default RUN/samples.png. Beside it lies "
        "a picture of which block did which step, ...-routing.svg."
    ),
]
Count = Annotated[int, typer.Option(min=1, help="How many samples; their classes come in turn.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help=f"Noise levels from the greatest to the least; by default {OF_EVAL}steps (50)."),
]
Solver = Annotated[
    AnySolver | None,
    typer.Option(
        help=f"By default {OF_EVAL}solver (heun), with which eval scores too. Heun evaluates twice a step; all but "
        "euler and heun are schedulers of diffusers."
    ),
]
Spacing = Annotated[
    Literal["karras", "slices"] | None,
    typer.Option(
        help="karras: steps over the whole range; slices: the same number in every slice. By default "
        f"{OF_EVAL}spacing (karras)."
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help=f"Classifier-free guidance, 1 for none; by default {OF_EVAL}guidance (1).")
]
Vae = Annotated[
    str | None, typer.Option(help="Folder of the autoencoder that made the latents: samples become pictures.")
]
TextEncoder = Annotated[
    str | None, typer.Option(help="Folder of the text encoder that made the embeddings, for --caption.")
]
Caption = Annotated[
    list[str] | None, typer.Option(help="What samples show, in turn; give it several times for several.")
]
