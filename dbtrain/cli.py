"""The command line."""

import json
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dbtrain import __version__
from dbtrain.config import Config, EvaluationConfig, load_config, parse_config
from dbtrain.errors import ConfigError, DbtrainError
from dbtrain.telemetry.console import make_console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a deep residual network as isolated blocks (DiffusionBlocks), merge them, and evaluate the whole.",
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; those that are shipped lie in configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as model.depth=12 blocks=3.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, host:port or ray://host:port; by default one on this machine alone."),
]
RunDirectory = Annotated[str, typer.Argument(help="Directory or URL of a run (out/name).")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake ends in one line and a non-zero code; a bug shows its traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DbtrainError as error:
            Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped; the same command continues from the last commits", highlight=False)
            raise typer.Exit(130) from None
        except (typer.Exit, BrokenPipeError):  # a reader that has seen enough, such as head, is no bug: click ends it
            raise
        except Exception:
            traceback.print_exc()
            print("this is a bug in dbtrain; please report it with the lines above", file=sys.stderr)
            raise typer.Exit(70) from None

    return wrapped


@app.command()
@_reported
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Evaluate the merged model at the end.")] = False,
) -> None:
    """Train all blocks, each on its own worker, then merge them. Run again, it continues what is not done."""
    chosen, console = _at(load_config(config, overrides or []), address), make_console()
    if evaluate:
        _check_metric(chosen)
    _train(chosen, console)
    if evaluate:
        _evaluate(chosen.run_url, [], console, chosen.evaluation)


def _check_metric(config: Config) -> None:
    """Refuse a metric that does not fit, or lacks what it needs, before hours of training, not after."""
    from dbtrain.evaluation.metrics import metric_of

    metric_of(config)


def _at(config: Config, address: str | None) -> Config:
    if address is None:
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": address})})


def _train(config: Config, console: Console) -> None:
    from dbtrain.analysis.calibrate import calibrate
    from dbtrain.coordinator.command import train as run_all
    from dbtrain.telemetry.console import LiveView

    with LiveView(console) as view:
        run_all(config, view, calibrate)
    _merge(config.run_url, console)


@app.command()
@_reported
def resume(run: RunDirectory, address: Address = None) -> None:
    """Continue a run from its directory, with the configuration it was started with."""
    _train(_at(_settled(run), address), make_console())


def _settled(run: str) -> Config:
    """The configuration of a run, where the run is now: its directory may have moved since it was started."""
    from dbtrain.shards.manifest import MANIFEST, read_manifest
    from dbtrain.shards.store import Store

    store = Store(run)
    config = parse_config(read_manifest(store)["config"], store.where(MANIFEST))
    out, _, name = store.url.rpartition("/")
    if name != config.name:
        raise ConfigError(
            f"{store.url} holds the run {config.name!r}: a run's directory has its name, so call it {out}/{config.name}"
        )
    return config.model_copy(update={"out": out or "/"})


@app.command()
@_reported
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show blocks, layers, ranges, memory and placement. Trains nothing and needs no GPU."""
    from dbtrain.coordinator.show_plan import show_plan

    show_plan(load_config(config, overrides or []), make_console())


@app.command()
@_reported
def status(run: RunDirectory) -> None:
    """Show what each block is doing, from the files of the run alone."""
    from dbtrain.coordinator.status import status as read_status
    from dbtrain.shards.store import Store
    from dbtrain.telemetry.console import blocks_table, duration

    console = make_console()
    blocks = read_status(Store(run))
    console.print(blocks_table([b.row for b in blocks]))
    for b in blocks:
        since = "" if b.since is None else f", {b.row.phase} since {duration(b.since)}"
        error = f"; last error: {b.error}" if b.error else ""
        console.print(
            f"block {b.row.block}: {b.attempts} attempt(s), last commit at step {b.committed}{since}{error}",
            highlight=False,
            markup=False,
        )


@app.command()
@_reported
def merge(run: RunDirectory) -> None:
    """Put the blocks of a finished run together and verify the result bit for bit."""
    _merge(run, make_console())


def _merge(run: str, console: Console) -> None:
    from dbtrain.evaluation.verify import merge_and_verify
    from dbtrain.shards.store import Store

    result, samples = merge_and_verify(Store(run))
    console.print(
        f"merged {len(result.blocks)} block(s), {result.parameters:,} parameters, into {result.path}; on {samples} "
        "samples it equals the blocks bit for bit",
        highlight=False,
        soft_wrap=True,
    )


@app.command(name="eval")
@_reported
def evaluate(run: RunDirectory, overrides: Overrides = None) -> None:
    """Evaluate the merged model of a run; overrides are of the section evaluation."""
    _evaluate(run, overrides or [], make_console())


def _evaluate(run: str, overrides: list[str], console: Console, section: EvaluationConfig | None = None) -> None:
    from dbtrain.evaluation.report import evaluate_run, scores_table
    from dbtrain.shards.store import Store

    console.print(scores_table(*evaluate_run(Store(run), overrides, section)))


@app.command()
@_reported
def sample(
    run: RunDirectory,
    out: Annotated[Path, typer.Option(help="A .png for a grid of pictures, or a .npy for the samples.")] = Path(
        "samples.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="Samples, the classes in turn.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Noise levels from the greatest to the least.")] = 50,
    solver: Annotated[Literal["euler", "heun"], typer.Option(help="Heun evaluates twice a step.")] = "heun",
    spacing: Annotated[
        Literal["karras", "slices"], typer.Option(help="Steps over the whole range, or the same number in every slice.")
    ] = "karras",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 for none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Draw samples from the merged model of a run, with one block at a time in memory."""
    from dbtrain.evaluation.pictures import sample_run
    from dbtrain.shards.store import Store

    sample_run(Store(run), out, count, steps, solver, spacing, guidance, seed)
    make_console().print(f"{count} samples of {run} in {out}", highlight=False, soft_wrap=True)


@app.command()
@_reported
def generate(
    run: RunDirectory,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    length: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of the softmax; 0 takes the likeliest each time.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the tokens drawn.")] = 0,
) -> None:
    """Continue a text with the merged model of a run."""
    from dbtrain.evaluation.generate import generate_text
    from dbtrain.shards.store import Store

    print(prompt + generate_text(Store(run), prompt, length, temperature, seed))


@app.command()
@_reported
def losses(
    run: RunDirectory,
    levels: Annotated[int, typer.Option(min=1, help="Levels, besides the boundaries.")] = 24,
    samples: Annotated[int, typer.Option(min=1, help="Of the validation split, at most.")] = 2048,
) -> None:
    """Show the loss of every block by noise level; at a boundary, of both neighbours."""
    from dbtrain.evaluation.losses import losses_table, measure_losses
    from dbtrain.shards.store import Store

    make_console().print(losses_table(measure_losses(Store(run), levels, samples)))


@app.command()
@_reported
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
) -> None:
    """Train the same layers in another way, with the FLOPs that the blocks take together, in a run of its own."""
    from dbtrain.coordinator.baseline import baseline as make_baseline

    console, made = make_console(), make_baseline(_at(load_config(config, overrides or []), address), kind)
    console.print(made.describe(), highlight=False, soft_wrap=True)
    _train(made.config, console)


@app.command()
@_reported
def compare(config: ConfigFile, overrides: Overrides = None, address: Address = None) -> None:
    """Train, merge and evaluate the blocks, then the end-to-end baseline at equal FLOPs, and show both."""
    from dbtrain.coordinator.baseline import end_to_end
    from dbtrain.coordinator.status import status as read_status
    from dbtrain.evaluation.report import comparison, evaluate_run
    from dbtrain.shards.store import Store
    from dbtrain.telemetry.console import blocks_table

    console = make_console()
    isolated = _at(load_config(config, overrides or []), address)
    _check_metric(isolated)
    together = end_to_end(isolated)
    _train(isolated, console)
    _train(together, console)
    runs = [Store(c.run_url) for c in (isolated, together)]
    for run, title in zip(runs, ("isolated blocks", "end to end, equal FLOPs"), strict=True):
        console.print(blocks_table([b.row for b in read_status(run)], title))
    (metric, ours), (_, theirs) = (evaluate_run(run, section=isolated.evaluation) for run in runs)
    console.print(comparison(metric, ours["test"], theirs["test"], isolated.evaluation.readout))


@app.command()
@_reported
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
    """Train a grid of block counts, noise ranges, partitions and seeds beside baselines; one table and one plot."""
    from dbtrain.coordinator.ablate import Grid, grid, policies, run_grid, summary
    from dbtrain.evaluation.figures import ablation_plot, ablation_table
    from dbtrain.evaluation.metrics import metric_of

    console, counts = make_console(), _integers(blocks)
    base = load_config(config, [*(overrides or []), f"blocks={counts[0]}"])
    _, metric = metric_of(base)
    kinds = [kind for kind in baselines.split(",") if kind]
    axes = Grid(counts, policies(base, ranges), partitions.split(","), _integers(seeds), kinds)
    variants = grid(str(config), overrides or [], axes)
    rows = summary(run_grid(str(config), variants, parallel, lambda line: console.print(line, highlight=False)))
    folder = Path(base.name + "-ablation")
    folder.mkdir(exist_ok=True)
    (folder / "ablation.json").write_text(json.dumps(rows, indent=2))
    ablation_plot(rows, metric, base.evaluation.readout, folder / "ablation.png")
    for split in ("validation", "test"):
        console.print(ablation_table(rows, metric, split))
    console.print(f"table and plot in {folder}/")


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of whole numbers with commas, such as 1,2,3") from None


@app.command()
@_reported
def doctor(
    address: Address = None,
    storage: Annotated[str, typer.Option(help="Directory or URL where runs shall lie (out=).")] = "runs",
    nodes: Annotated[int | None, typer.Option(help="Nodes to wait for and to have at least.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that each node must give.")] = None,
) -> None:
    """Look whether this machine or a cluster would carry a run; say what would not work, and how to mend it."""
    from dbtrain.coordinator.doctor import doctor as examine

    examine(address, storage, nodes, gpus, make_console())


launch = typer.Typer(no_args_is_help=True, help="Start a run where a scheduler gives out the machines.")
app.add_typer(launch, name="launch")


@launch.callback()
def _launch() -> None:
    """Keep the scheduler's name in the command, though there is only one yet."""


@launch.command()
@_reported
def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; one Ray node runs on each.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of each.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs of each.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit; at its end the job commits and queues again.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
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
@_reported
def punish(
    config: ConfigFile,
    overrides: Overrides = None,
    mtbf: Annotated[float, typer.Option(min=0.1, help="Mean time between faults, in seconds.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Disturbed runs, at most.")] = 10,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds after the undisturbed run after which no fault is made.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the times and kinds of the faults.")] = 0,
) -> None:
    """Kill workers, commits and the command itself at random; every run must end in the bits of an undisturbed one."""
    from dbtrain.coordinator.punish import Punisher
    from dbtrain.errors import IncompleteRunError

    console = make_console()
    settled = load_config(config, overrides or [])
    punisher = Punisher([str(config), *(overrides or [])], settled, mtbf, seed, time_limit, console.print)
    tally = punisher.punish(runs)
    console.print(tally.table())
    if tally.differences:
        raise IncompleteRunError("; ".join(tally.differences))


@app.command()
@_reported
def inspect(path: Annotated[str, typer.Argument(help="A shard, or the directory of a run or merged model.")]) -> None:
    """Show what a shard, a run or a merged model holds, and verify it."""
    from dbtrain.evaluation.inspect import inspect_path

    inspect_path(path, make_console())


@app.command()
def version() -> None:
    """Show the version."""
    print(__version__)


def main() -> None:
    """Entry point."""
    app()
