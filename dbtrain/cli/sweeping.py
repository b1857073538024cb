"""The command that looks into the layers of a model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dbtrain.cli.command import app, reported
from dbtrain.telemetry.console import LiveView, make_console
from dbtrain.telemetry.layout import say, show_table

TEXT_SETS = ("weekdays", "months", "letters", "numbers")


@app.command()
@reported
def sweep(
    model: Annotated[
        str, typer.Argument(help="A merged run, or the Hugging Face folder of a causal language model or a ViT.")
    ],
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            help="weekdays, months, letters, numbers, or a YAML file; may be given again. By default all four, "
            "or of a classifier its classes."
        ),
    ] = None,
    behaviour: Annotated[
        Literal["vocabulary", "concepts"],
        typer.Option(help="Compare the whole next-token distribution, or the labels' first tokens and the rest."),
    ] = "vocabulary",
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another model of as many layers, for CKA layer by layer; may be given again."),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(help="What the folder of a ViT reads: a folder of pictures for each class, or Parquet files."),
    ] = None,
    pca: Annotated[int, typer.Option(min=2, help="Axes on which states are compared, at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Of permutations and resamples.")] = 0,
    to: Annotated[
        Path | None, typer.Option(help="A .json file; by default RUN/sweep.json, or NAME-sweep.json of a folder.")
    ] = None,
) -> None:
    """Measure every layer of a model: how its distances between concepts agree with its behaviour."""
    from dbtrain.evaluation.sweep.open import check_to, keep_sweep, open_models
    from dbtrain.evaluation.sweep.sweep import beside_table, lines, sweep_table
    from dbtrain.evaluation.sweep.sweep import sweep as measure

    console = make_console()
    check_to(to)
    (read, *others), sets = open_models([model, *(beside or ())], concepts, TEXT_SETS, pictures)
    with LiveView(console) as view:
        found = measure(read, sets, behaviour, pca, seed, view.count, others)
    for result in found.sets:
        show_table(console, sweep_table(result))
    if found.beside:
        show_table(console, beside_table(found))
    lines(found, lambda line: say(console, line))
    say(console, f"sweep of {model} in {keep_sweep(model, found, to)}")
