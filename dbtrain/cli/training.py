"""Commands that train a run, look at it, and put it together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dbtrain.cli.command import (
    Address,
    BlockNumbers,
    ConfigFile,
    Overrides,
    RunDirectory,
    Verbose,
    app,
    numbers,
    reported,
)
from dbtrain.config import Config, load_config
from dbtrain.config.data import PLACES
from dbtrain.telemetry.console import make_console
from dbtrain.telemetry.layout import say, show_table

if TYPE_CHECKING:
    from dbtrain.api import Merged


@app.command()
@reported
def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Seal a run without training it: a small folder, of which other places get a copy and train blocks."""
    from dbtrain import api
    from dbtrain.telemetry.console import LiveView

    chosen, console = load_config(config, overrides or []), make_console()
    with LiveView(console) as view:
        sealed = api.prepare(chosen, view).manifest
    say(
        console,
        f"sealed {chosen.run_url}: {sealed.blocks} block(s), data {sealed.data_hash[:16]}; copy this folder "
        f"to other places, and train there with dbtrain train FOLDER --blocks NUMBERS",
    )
    if chosen.init.branch:
        say(console, f"before it is copied, train its branch: dbtrain train {chosen.run_url} --blocks branch")


@app.command()
@reported
def train(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="YAML file, the name of a shipped one (dbtrain configs), or a run that is prepared.",
        ),
    ],
    overrides: Overrides = None,
    blocks: BlockNumbers = None,
    address: Address = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Evaluate the merged model at the end.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train all blocks, each on its own worker, then merge them. Run again, it continues what is not done."""
    from dbtrain.run.continued import is_run, run_config
    from dbtrain.run.run import BRANCH

    given, console = overrides or [], make_console()
    chosen = run_config(target, given) if is_run(target) else load_config(target, given)
    chosen = at_address(chosen, address)
    if evaluate or chosen.evaluation.metric is not None:
        check_metric(chosen)
    only = None if blocks is None else () if blocks == BRANCH else numbers(blocks)
    merged = train_and_merge(chosen, console, verbose, only)
    if merged and not evaluate:
        say(
            console,
            f"score it with dbtrain eval {chosen.run_url}, and look at all of it with dbtrain report {chosen.run_url}",
        )
    if evaluate and merged:
        from dbtrain.cli.results import evaluate_and_say  # not above: --help lists commands as they are imported

        places = [override for override in given if override.startswith(PLACES)]
        evaluate_and_say(chosen.run_url, places, console, chosen.evaluation)


def check_metric(config: Config) -> None:
    """Refuse a metric that does not fit, or lacks what it needs, before hours of training, not after."""
    from dbtrain.evaluation.metrics import metric_of

    metric_of(config)


def at_address(config: Config, address: str | None) -> Config:
    """The configuration with the cluster that the option names, if it names one."""
    if address is None:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": address})})


def train_and_merge(config: Config, console: Console, verbose: bool = False, only: Sequence[int] | None = None) -> bool:
    """Train a run, or what is left of it, with a live view, and merge it; whether it was merged.

    With `only` these blocks alone are trained (none but the branch if it is empty),
    and the run is merged if no other is missing.
    """
    from dbtrain import api
    from dbtrain.run.gather import missing
    from dbtrain.run.merge import on_standard_error
    from dbtrain.telemetry.console import LiveView

    with LiveView(console) as view:
        run = api.train(config, blocks=only, view=view, verbose=verbose)
    left = missing(run)
    if left:
        say(
            console,
            f"not merged, since {', '.join(left)} of {config.run_url} is not here: gather what other places train",
        )
        return False
    say(console, _merged(api.merge(run, config=config, tell=on_standard_error)))
    return True


@app.command()
@reported
def resume(run: RunDirectory, address: Address = None, verbose: Verbose = False) -> None:
    """Continue a run from its directory, with the configuration it was started with."""
    from dbtrain.api import run_config

    train_and_merge(at_address(run_config(run), address), make_console(), verbose)


@app.command()
@reported
def extend(
    run: RunDirectory,
    lengths: Annotated[
        list[str] | None,
        typer.Argument(metavar="LENGTHS...", help="training.steps=4000, or training.blocks.2.steps=4000 of one block."),
    ] = None,
) -> None:
    """Make the blocks of a run longer, all or single ones; resume trains them on from their commits."""
    from dbtrain.run.continued import check_name, longer
    from dbtrain.run.extend import extend as make_longer
    from dbtrain.run.run import Run

    console = make_console()
    whole, wanted = Run.at(run), longer(run, lengths or [])
    check_name(whole)  # or the next command would refuse it
    made = make_longer(whole, wanted, lambda line: say(console, line))
    say(console, f"{len(made.stretches)} block(s) of {run} became longer; now: dbtrain resume {run}")


@app.command()
@reported
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Memory of the GPU that it is for, as in 80GiB; by default this machine's."),
    ] = None,
    node: Annotated[
        list[str] | None,
        typer.Option("--node", help="A node of a cluster that is not here, as in CPU=32,GPU=4 or 2xCPU=32,GPU=4."),
    ] = None,
) -> None:
    """Show blocks, layers, ranges, memory, placement and what a GPU holds.
    Needs no GPU; trains at most a pilot for the range."""
    from dbtrain.experiments.plan_table import show_plan

    show_plan(load_config(config, overrides or []), make_console(), Console(stderr=True), memory, node or ())


@app.command()
@reported
def status(run: RunDirectory) -> None:
    """Show what each block is doing, from the files of the run alone."""
    from dbtrain import api
    from dbtrain.coordinator.lifecycle import Phase
    from dbtrain.coordinator.status import preparation
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.directory import check_run_path
    from dbtrain.telemetry.console import blocks_table, duration

    console = make_console()
    of = Run.at(run)
    check_run_path(of.store)
    under_way = preparation(of)
    if under_way:
        say(console, under_way)
        return
    blocks = api.status(of)
    show_table(console, blocks_table([b.row for b in blocks], width=console.width))
    for b in blocks:
        since = "" if b.since is None else f", {b.row.phase} since {duration(b.since)}"
        error = f"; last error: {b.error}" if b.error else ""
        say(
            console,
            f"{b.row.name}: {b.attempts} attempt(s), last commit at step {b.committed}{b.origin}{since}"
            + (f", worker {b.worker}" if b.worker else "")
            + error,
        )
    left = [f"{b.row.name} (step {b.committed} of {b.row.steps})" for b in blocks if b.committed < b.row.steps]
    under_command = {Phase.PLACED.value, Phase.RUNNING.value}  # without a command they would be lost
    if left and not any(b.row.phase in under_command for b in blocks):
        say(console, f"missing here: {', '.join(left)}; train what is missing, or gather it from where it was trained")


@app.command()
@reported
def merge(
    run: RunDirectory,
    overrides: Overrides = None,
    now: Annotated[
        bool, typer.Option("--now", help="Take blocks that are not done as far as they are; the run may be training.")
    ] = False,
) -> None:
    """Put the blocks of a finished run together and verify the result; overrides say where the data lies."""
    from dbtrain import api
    from dbtrain.run.merge import on_standard_error

    say(make_console(), _merged(api.merge(run, overrides or [], now=now, tell=on_standard_error)))


def _merged(merged: "Merged") -> str:
    """What was made of a run, in words."""
    result = merged.result
    progress = f"; its blocks are not done: {result.progress}" if result.progress else ""
    samples = "1 sample" if merged.samples == 1 else f"{merged.samples} samples"
    return (
        f"merged {len(result.blocks)} block(s), {result.parameters:,} parameters, into {result.path}; on "
        f"{samples} it equals the blocks bit for bit{progress}"
    )
