"""Commands that carry blocks of a run, or its model, from one place to another."""

from typing import Annotated

import typer

from dbtrain.cli.command import BlockNumbers, Now, RunDirectory, app, numbers, reported
from dbtrain.telemetry.console import LiveView, make_console
from dbtrain.telemetry.layout import say


@app.command()
@reported
def pack(
    run: RunDirectory,
    to: Annotated[str, typer.Option("--to", help="Path or URL of the file to make.")],
    blocks: BlockNumbers = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out the optimizer's states; for blocks that are done.")
    ] = False,
) -> None:
    """Put blocks, as far as they are trained, into one file that can be carried to another place."""
    from dbtrain.run.pack import pack as make
    from dbtrain.run.run import Run
    from dbtrain.shards.copies import described
    from dbtrain.shards.storage.directory import check_run_path

    console, whole = make_console(), Run.at(run)
    check_run_path(whole.store)
    with LiveView(console) as view:
        packed = make(whole, to, None if blocks is None else numbers(blocks), weights_only, view.count)
    for block, commit in packed.commits.items():
        say(console, f"block {block}: {described(commit)}")
    say(console, f"packed into {packed.url}, SHA-256 {packed.sha256}; dbtrain gather takes it at another place")


@app.command()
@reported
def gather(
    run: RunDirectory,
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="FROM...", help="Copies of the run's folder, and packed files; or URLs."),
    ] = None,
    take: Annotated[
        str | None,
        typer.Option(help="Which of them counts where places differ, even if its checkpoint is older."),
    ] = None,
    blocks: BlockNumbers = None,
) -> None:
    """Take blocks into a run that other places trained; verified, and each whole or not at all."""
    from dbtrain.errors import ConfigError
    from dbtrain.run.gather import gather as take_all
    from dbtrain.run.gather import missing
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.directory import check_run_path

    if not sources and take is None:
        raise ConfigError("there is nothing to gather from: give copies of the run's folder, packed files or URLs")
    console, whole = make_console(), Run.at(run)
    check_run_path(whole.store)
    with LiveView(console) as view:
        take_all(whole, sources or [], take, None if blocks is None else numbers(blocks), view.tell, view.count)
    left = missing(whole)
    say(console, f"missing: {', '.join(left)}" if left else f"all blocks are done; now: dbtrain merge {run}")


@app.command()
@reported
def export(
    run: RunDirectory,
    to: Annotated[str, typer.Option("--to", help="Folder to make; an older export there is replaced.")],
    now: Now = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Of a network of diffusers or transformers: each block as a folder that from_pretrained loads.",
        ),
    ] = False,
) -> None:
    """Write the merged model of a run into a folder that loads without dbtrain."""
    from dbtrain.evaluation.export.write import export_run
    from dbtrain.evaluation.opening import model_of, progress_of
    from dbtrain.run.run import Run

    console, of = make_console(), Run.at(run)
    with model_of(of, now) as merged, LiveView(console) as view:
        progress = progress_of(of, merged)
        able = export_run(of, merged, to, progress, view.count, plain)
    note = f"; its blocks are not done: {progress}" if progress else ""
    offers = "README.md says how to load it" if plain else f"modeling.py offers {', '.join(['load', *able])}"
    say(console, f"exported into {to}: {offers}{note}")
