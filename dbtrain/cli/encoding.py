"""The command that makes training data of pictures."""

from typing import Annotated, Literal

import typer

from dbtrain.cli.command import app, reported
from dbtrain.telemetry.console import LiveView, make_console
from dbtrain.telemetry.layout import say


@app.command()
@reported
def encode(
    source: Annotated[str, typer.Argument(help="Folder of pictures: folders of classes, or pictures with captions.")],
    vae: Annotated[str, typer.Option(help="Folder of an autoencoder of diffusers, or of a pipeline.")],
    to: Annotated[str, typer.Option("--to", help="Folder of the files; the same command goes on in it.")],
    text: Annotated[
        str | None, typer.Option(help="Folder of a text encoder of transformers, or of a pipeline, for captions.")
    ] = None,
    size: Annotated[str, typer.Option(help="Pixels to which pictures are brought, as 256 or 256x384 (HxW).")] = "256",
    resize: Annotated[Literal["crop", "pad", "squash"], typer.Option(help="How they are brought there.")] = "crop",
    background: Annotated[
        Literal["black", "white"] | None, typer.Option(help="Below transparent pixels, and of bars.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of a caption, filled up or cut off.")] = 77,
    batch: Annotated[int, typer.Option(min=1, help="Samples that are encoded at once.")] = 16,
    per_file: Annotated[int, typer.Option(min=1, help="Samples of a file.")] = 1024,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Of the encoders, and of the embeddings that are kept.")
    ] = "fp32",
) -> None:
    """Encode pictures and captions into files for data.source=encoded, with encoders that lie on disk."""
    from dbtrain.encoding.encode import Encoding
    from dbtrain.encoding.encode import encode as make

    console = make_console()
    how = Encoding(_size(size), resize, background, tokens, batch, per_file, precision)
    with LiveView(console) as view:
        lines = make(source, vae, text, to, how, view.count)
    for line in lines:
        say(console, line)


def _size(text: str) -> tuple[int, int]:
    from dbtrain.errors import ConfigError

    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--size {text} is neither a number of pixels nor two, as 256x384 (height x width)")
    return int(parts[0]), int(parts[-1])
