"""Commands that train more than one run and put them side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.cli.command import Address, ConfigFile, Overrides, Verbose, app, numbers, reported
from dbtrain.cli.training import at_address, check_metric, train_and_merge
from dbtrain.config import load_config
from dbtrain.errors import ShardError
from dbtrain.telemetry.console import make_console
from dbtrain.telemetry.layout import say, show_table


@app.command()
@reported
def baseline(
    config: ConfigFile,
    overrides: Overrides = None,
    kind: Annotated[
        str,
        typer.Option(
            help="end_to_end; checkpointing: the same with activation checkpointing; joint: all blocks in one process, "
            "with one stem and head; for classifiers: greedy (layer-wise), forward_forward, ensemble of shallow nets."
        ),
    ] = "end_to_end",
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Train the same layers in another way, with the FLOPs that the blocks take together,
    in a run of its own."""
    from dbtrain.experiments.baseline import baseline as make_baseline

    console, made = make_console(), make_baseline(at_address(load_config(config, overrides or []), address), kind)
    say(console, made.describe())
    train_and_merge(made.config, console, verbose)


@app.command()
@reported
def compare(config: ConfigFile, overrides: Overrides = None, address: Address = None) -> None:
    """Train, merge and evaluate the blocks, then the end-to-end baseline at equal FLOPs, and show both."""
    from dbtrain import api
    from dbtrain.evaluation.report import comparison
    from dbtrain.experiments.baseline import end_to_end
    from dbtrain.run.run import Run
    from dbtrain.telemetry.console import LiveView, blocks_table

    console = make_console()
    isolated = at_address(load_config(config, overrides or []), address)
    check_metric(isolated)
    together = end_to_end(isolated)
    train_and_merge(isolated, console)
    train_and_merge(together, console)
    runs = [Run.at(c.run_url) for c in (isolated, together)]
    for run, title in zip(runs, ("isolated blocks", "end to end, equal FLOPs"), strict=True):
        show_table(console, blocks_table([b.row for b in api.status(run)], title, console.width))
    found: list[api.Evaluation] = []
    unwritten: list[str] = []
    with LiveView(console) as view:
        for number, run in enumerate(runs, 1):
            try:
                api.evaluate(run, section=isolated.evaluation, view=view, shown=found.append)
            except ShardError as error:
                if len(found) < number:
                    raise
                unwritten.append(str(error))  # told below the table, for which everything is there
    ours, theirs = (each.scores["test"] for each in found)
    show_table(console, comparison(found[0].metric, ours, theirs, isolated.evaluation.readout))
    if unwritten:
        raise ShardError("; ".join(unwritten))


@app.command()
@reported
def ablate(
    config: ConfigFile,
    overrides: Overrides = None,
    blocks: Annotated[str, typer.Option(help="Block counts, with commas.")] = "1,2,3,4,6",
    ranges: Annotated[
        str | None,
        typer.Option(help="Policies of the noise range, with commas; by default calibrated,paper if there are codes."),
    ] = None,
    partitions: Annotated[
        str, typer.Option(help="Shares of layers, with commas: even, front (the first blocks have more), back.")
    ] = "even",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    baselines: Annotated[str, typer.Option(help='Kinds of baselines, with commas; "" for none.')] = "end_to_end",
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time; each also asks the cluster for its GPUs.")] = 1,
) -> None:
    """Train a grid of block counts, noise ranges, partitions and seeds beside baselines;
    one table and one plot."""
    from dbtrain.evaluation.metrics import metric_of
    from dbtrain.experiments.ablate import Grid, grid, policies, run_grid, summary
    from dbtrain.experiments.figures import ablation_plot, ablation_table

    console, counts = make_console(), numbers(blocks)
    base = load_config(config, [*(overrides or []), f"blocks={counts[0]}"])
    _, metric = metric_of(base)
    kinds = [kind for kind in baselines.split(",") if kind]
    axes = Grid(counts, policies(base, ranges), partitions.split(","), numbers(seeds), kinds)
    variants = grid(str(config), overrides or [], axes)
    rows = summary(run_grid(str(config), variants, parallel, lambda line: say(console, line)))
    for split in ("validation", "test"):
        show_table(console, ablation_table(rows, metric, split))
    folder = Path(base.name + "-ablation")
    try:
        folder.mkdir(exist_ok=True)
        (folder / "ablation.json").write_text(json.dumps(rows, indent=2))
        ablation_plot(rows, metric, base.evaluation.readout, folder / "ablation.png")
    except OSError as error:
        raise ShardError(
            f"the tables above are complete, but {folder.absolute()}/ cannot be written ({error.strerror}): run the "
            "same command where it can; what is trained is not trained again"
        ) from error
    say(console, f"table and plot in {folder}/")
