"""Commands that train a run, look at it, and put it together."""

from typing import Annotated

import typer
from rich.console import Console

from dbtrain.cli.command import Address, ConfigFile, Overrides, RunDirectory, Verbose, app, reported
from dbtrain.config import Config, load_config
from dbtrain.errors import ConfigError
from dbtrain.telemetry.console import make_console
from dbtrain.telemetry.layout import say, show_table


@app.command()
@reported
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Evaluate the merged model at the end.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train all blocks, each on its own worker, then merge them. Run again, it continues what is not done."""
    chosen, console = at_address(load_config(config, overrides or []), address), make_console()
    if evaluate or chosen.evaluation.metric is not None:
        check_metric(chosen)
    train_and_merge(chosen, console, verbose)
    if evaluate:
        from dbtrain.cli.results import evaluate_and_say  # not above: --help lists commands as they are imported

        evaluate_and_say(chosen.run_url, [], console, chosen.evaluation)


def check_metric(config: Config) -> None:
    """Refuse a metric that does not fit, or lacks what it needs, before hours of training, not after."""
    from dbtrain.evaluation.metrics import metric_of

    metric_of(config)


def at_address(config: Config, address: str | None) -> Config:
    """The configuration with the cluster that the option names, if it names one."""
    if address is None:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": address})})


def train_and_merge(config: Config, console: Console, verbose: bool = False) -> None:
    """Train a run, or what is left of it, with a live view, and merge it."""
    from dbtrain.coordinator.train import train as run_all
    from dbtrain.run.calibrate import announced
    from dbtrain.telemetry.console import LiveView

    with LiveView(console) as view:
        calibrate = announced(view.tell, "once in a run, which keeps the range in run.json", view.count)
        run_all(config, view, calibrate, verbose)
    merge_and_say(config.run_url, console)


@app.command()
@reported
def resume(run: RunDirectory, address: Address = None, verbose: Verbose = False) -> None:
    """Continue a run from its directory, with the configuration it was started with."""
    train_and_merge(at_address(_settled(run), address), make_console(), verbose)


def _settled(run: str) -> Config:
    """The configuration of a run, where the run is now: its directory may have moved since it was started."""
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.directory import check_run_path

    whole = Run.at(run)
    check_run_path(whole.store)
    config, url = whole.config, whole.store.url
    out, _, name = url.rpartition("/")
    if name != config.name:
        raise ConfigError(
            f"{url} holds the run {config.name!r}: a run's directory has its name, so call it {out}/{config.name}"
        )
    return config.model_copy(update={"out": out or "/"})


@app.command()
@reported
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show blocks, layers, ranges, memory and placement. Needs no GPU; trains at most a pilot for the range."""
    from dbtrain.experiments.plan_table import show_plan

    show_plan(load_config(config, overrides or []), make_console(), Console(stderr=True))


@app.command()
@reported
def status(run: RunDirectory) -> None:
    """Show what each block is doing, from the files of the run alone."""
    from dbtrain.coordinator.status import preparation
    from dbtrain.coordinator.status import status as read_status
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
    blocks = read_status(of)
    show_table(console, blocks_table([b.row for b in blocks], width=console.width))
    for b in blocks:
        since = "" if b.since is None else f", {b.row.phase} since {duration(b.since)}"
        error = f"; last error: {b.error}" if b.error else ""
        say(
            console,
            f"{b.row.name}: {b.attempts} attempt(s), last commit at step {b.committed}{since}"
            + (f", worker {b.worker}" if b.worker else "")
            + error,
        )


@app.command()
@reported
def merge(run: RunDirectory) -> None:
    """Put the blocks of a finished run together and verify the result bit for bit."""
    merge_and_say(run, make_console())


def merge_and_say(run: str, console: Console) -> None:
    """Merge and verify a run, and say what was made."""
    from dbtrain.evaluation.verify import merge_and_verify
    from dbtrain.run.run import Run

    result, samples = merge_and_verify(Run.at(run))
    say(
        console,
        f"merged {len(result.blocks)} block(s), {result.parameters:,} parameters, into {result.path}; on {samples} "
        "samples it equals the blocks bit for bit",
    )
