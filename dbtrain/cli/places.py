"""Commands about where runs are trained: clusters, schedulers, and faults on purpose."""

from typing import Annotated

import typer

from dbtrain import __version__
from dbtrain.cli.command import Address, ConfigFile, Overrides, app, reported
from dbtrain.config import load_config
from dbtrain.telemetry.console import make_console
from dbtrain.telemetry.layout import say, show_table


@app.command()
@reported
def doctor(
    address: Address = None,
    storage: Annotated[str, typer.Option(help="Directory or URL where runs are to lie (out=).")] = "runs",
    nodes: Annotated[int | None, typer.Option(help="Nodes to wait for and to have at least.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that each node must give.")] = None,
) -> None:
    """Check whether this machine or a cluster would carry a run;
    say what would not work, and how to fix it."""
    from dbtrain.doctor.report import doctor as examine

    examine(address, storage, nodes, gpus, make_console())


launch = typer.Typer(no_args_is_help=True, help="Start a run where a scheduler gives out the machines.")


app.add_typer(launch, name="launch")


@launch.callback()
def _launch() -> None:
    """Keep the scheduler's name in the command, though there is only one yet."""


@launch.command()
@reported
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; one Ray node runs on each.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of each node.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs of each node.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit; at its end the job commits and queues again.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the scheduler.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that the job is charged to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, submit nothing.")] = False,
) -> None:
    """Submit a run as a Slurm job that survives lost nodes, preemption and its time limit."""
    from dbtrain.launch.slurm import submit

    options = {
        "nodes": nodes,
        "gpus-per-node": gpus_per_node,
        "cpus-per-task": cpus_per_node,
        "time": time,
        "partition": partition,
        "account": account,
    }
    print(submit(options, config, overrides or [], gpus_per_node, dry_run))


@app.command()
@reported
def punish(
    config: ConfigFile,
    overrides: Overrides = None,
    mtbf: Annotated[float, typer.Option(min=0.1, help="Mean time between faults, in seconds.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="How many runs are disturbed, at most.")] = 10,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds after the undisturbed run after which no fault is made.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(help="Seed of the times and kinds of the faults.")] = 0,
) -> None:
    """Kill workers, commits and the command itself at random;
    every run must end in the bits of an undisturbed one."""
    from dbtrain.errors import IncompleteRunError
    from dbtrain.experiments.chaos import Punisher

    console = make_console()
    settled = load_config(config, overrides or [])
    punisher = Punisher(
        [str(config), *(overrides or [])], settled, mtbf, seed, time_limit, lambda line: say(console, line)
    )
    tally = punisher.punish(runs)
    show_table(console, tally.table())
    if tally.differences:
        raise IncompleteRunError("; ".join(tally.differences))


@app.command()
@reported
def version() -> None:
    """Show the version."""
    print(__version__)
