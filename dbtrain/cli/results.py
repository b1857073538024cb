"""Commands that look at what a run has learnt."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from dbtrain.cli import drawing
from dbtrain.cli.command import Now, Overrides, RunDirectory, app, reported
from dbtrain.config import EvaluationConfig
from dbtrain.errors import ConfigError
from dbtrain.telemetry.console import LiveView, make_console
from dbtrain.telemetry.layout import say, show_table

if TYPE_CHECKING:  # a command imports PyTorch when it needs it
    from torch import Tensor

    from dbtrain.evaluation.images.pictures import Captions, Decode


@app.command(name="eval")
@reported
def evaluate(run: RunDirectory, overrides: Overrides = None) -> None:
    """Evaluate the merged model of a run; overrides are of the section evaluation,
    or say where the data lies."""
    evaluate_and_say(run, overrides or [], make_console())


def evaluate_and_say(run: str, overrides: list[str], console: Console, section: EvaluationConfig | None = None) -> None:
    """Evaluate a run and print its scores."""
    from dbtrain import api
    from dbtrain.evaluation.report import scores_table

    def show(found: api.Evaluation) -> None:
        show_table(console, scores_table(found.metric, found.scores, found.progress))

    with LiveView(console) as view:
        api.evaluate(run, overrides, section=section, view=view, shown=show)


@app.command()
@reported
def sample(
    run: RunDirectory,
    out: drawing.Out = None,
    count: drawing.Count = 64,
    steps: drawing.Steps = None,
    solver: drawing.Solver = None,
    spacing: drawing.Spacing = None,
    guidance: drawing.Guidance = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    vae: drawing.Vae = None,
    text: drawing.TextEncoder = None,
    caption: drawing.Caption = None,
    overrides: Overrides = None,
    now: Now = False,
) -> None:
    """Draw samples from the merged model of a run, block after block;
    overrides such as evaluation.batch_size=2048."""
    from dbtrain.coordinator.pipeline_hosts import open_hosts
    from dbtrain.evaluation.images.asked import check_asked
    from dbtrain.evaluation.images.pictures import sample_run
    from dbtrain.evaluation.opening import model_of, progress_of
    from dbtrain.evaluation.overrides import overridden
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.directory import check_run_path

    console, of = make_console(), Run.at(run)
    took: list[str] = []
    captions, decoder = _captions(text, caption, console), partial(_decoder, vae) if vae is not None else None
    options = {"steps": steps, "solver": solver, "spacing": spacing, "guidance": guidance}
    asked = [*(overrides or []), *(f"evaluation.{key}={value}" for key, value in options.items() if value is not None)]
    if now:  # before weights are copied
        check_run_path(of.store)
        run_plan = of.plan
        config = overridden(run_plan.config, asked)
        check_asked(run_plan, config, out or Path("now.png"), vae is not None, captions is not None)
    with model_of(of, now) as merged, LiveView(console) as view:
        if now and out is None:
            out = Path(f"{merged.manifest.name}-now.png")  # into the run nothing is written
        drawn = (of, out, count, seed, asked, view.count, took.append, merged, captions, decoder)
        where, routing = sample_run(*drawn, hosts=open_hosts)
        names, progress = merged.manifest.class_names, progress_of(of, merged)
    classes = f"; classes in turn: {', '.join(names[:count])}" if names else ""
    say(console, f"{count} samples of {run} in {where}{classes}{_not_done(progress)}")
    if routing:
        say(console, f"which block did which step is shown in {routing}")
    say(console, f"took {took[0]}")


def _captions(text: str | None, texts: list[str] | None, console: Console) -> "Captions | None":
    """Captions that samples are to show, and how the text encoder of a folder reads them."""
    if not texts and text is None:
        return None
    if not texts or text is None:
        raise ConfigError("--text FOLDER and --caption belong together: give both, or neither")
    import torch

    from dbtrain.encoding.encoders import TextEncoder
    from dbtrain.evaluation.images.pictures import Captions

    def encode(length: int) -> "tuple[Tensor, Tensor]":
        encoder = TextEncoder(text, length, torch.device("cpu"), torch.float32)
        made = encoder(texts)
        if encoder.cut:
            say(console, f"warning: {encoder.cut} captions have more than {length} tokens and were cut off")
        return made

    return Captions(texts, encode)


def _decoder(vae: str) -> "Decode":
    """How the autoencoder of a folder makes pictures of latents."""
    import torch

    from dbtrain.encoding.encoders import PictureEncoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return PictureEncoder(vae, device, torch.float32).decode


def _not_done(progress: str) -> str:
    return f"; its blocks are not done: {progress}" if progress else ""


@app.command()
@reported
def generate(
    run: RunDirectory,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to add; by default what the model's window has room for, at most 128."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Temperature of the softmax; 0 takes the likeliest token each time.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the tokens that are drawn.")] = 0,
    now: Now = False,
    keep: Annotated[bool, typer.Option("--keep", help="Also keep it in RUN/texts.json, for the report.")] = False,
    overrides: Overrides = None,
) -> None:
    """Continue a text with the merged model of a run; overrides such as evaluation.resident=one."""
    from dbtrain.coordinator.pipeline_hosts import open_hosts
    from dbtrain.evaluation.opening import model_of, progress_of
    from dbtrain.evaluation.text.generate import generate_text
    from dbtrain.evaluation.text.kept_texts import KeptText, keep_text
    from dbtrain.run.run import Run

    of = Run.at(run)
    took: list[str] = []
    with model_of(of, now) as merged:
        asked = (prompt, length, temperature, seed, merged, overrides or [], took.append)
        text = generate_text(of, *asked, hosts=open_hosts)
        progress, weights = progress_of(of, merged), merged.weights_hash
    print(prompt + text)
    if keep:
        keep_text(of, KeptText(prompt, text, temperature, seed, progress, weights))
    for line in took:
        say(Console(stderr=True), line)
    if progress:
        say(Console(stderr=True), f"by a model whose blocks are not done: {progress}")


@app.command()
@reported
def predict(
    run: RunDirectory,
    pictures: Annotated[list[str] | None, typer.Argument(help="Picture files, which a classifier names.")] = None,
    text: Annotated[str | None, typer.Option(help="A text, whose bits a language model tells.")] = None,
    fit: Annotated[
        Literal["crop", "pad", "squash"] | None,
        typer.Option(help="Bring pictures of another size or other colours to the model's."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes shown of each picture.")] = 5,
    resident: Annotated[
        Literal["auto", "all", "one"] | None,
        typer.Option(help="Blocks in memory; by default as the run's evaluation.resident says."),
    ] = None,
    now: Now = False,
) -> None:
    """Classify pictures, or tell how likely a text is, with the merged model of a run."""
    import torch

    from dbtrain.evaluation import predict as room
    from dbtrain.evaluation.opening import model_of, open_run, progress_of
    from dbtrain.evaluation.overrides import overridden
    from dbtrain.run.run import Run

    if (not pictures) == (text is None):
        raise ConfigError("give picture files, or a text with --text, and not both")
    console, of = make_console(), Run.at(run)
    with model_of(of, now) as merged:
        changed = partial(overridden, overrides=[f"evaluation.resident={resident}"] if resident else [])
        model = open_run(of, torch.device("cuda" if torch.cuda.is_available() else "cpu"), merged, changed)
        progress = progress_of(of, merged)
        if text is not None:
            say(console, room.score_text(model, text).line())
        elif pictures:
            probabilities = room.classify_files(model, pictures, fit).cpu()
            for file, row in zip(pictures, probabilities, strict=True):
                show_table(console, room.classes_table(model, file, row, top))
        if not model.blocks.all_here:
            say(console, model.blocks.told())
    if progress:
        say(console, f"by a model whose blocks are not done: {progress}")


@app.command()
@reported
def losses(
    run: RunDirectory,
    levels: Annotated[int, typer.Option(min=1, help="Noise levels, besides the boundaries.")] = 24,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the validation split, at most.")] = 2048,
    overrides: Overrides = None,
) -> None:
    """Show the loss of every block by noise level; at a boundary, of both neighbours.

    Overrides such as evaluation.resident=one.
    """
    from dbtrain.coordinator.pipeline_hosts import open_hosts
    from dbtrain.evaluation.losses import losses_table, measure_losses
    from dbtrain.evaluation.opening import merged_of, progress_of
    from dbtrain.run.run import Run

    console, of = make_console(), Run.at(run)
    took: list[str] = []
    with LiveView(console) as view:
        measure_losses(
            of, levels, samples, lambda points: show_table(console, losses_table(points)), view.count,
            overrides or [], took.append, open_hosts,
        )  # fmt: skip
    for line in took:
        say(console, line)
    if progress := progress_of(of, merged_of(of)):
        say(console, f"its blocks are not done: {progress}")


@app.command()
@reported
def inspect(path: Annotated[str, typer.Argument(help="A shard, or the directory of a run or merged model.")]) -> None:
    """Show what a shard, a run or a merged model holds, and verify it."""
    from dbtrain.evaluation.inspect import inspect_path

    inspect_path(path, make_console())


@app.command()
@reported
def report(
    run: RunDirectory,
    to: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/report.html.")] = None,
) -> None:
    """Write one HTML page about a run, finished or not: verdict, curves, noise, costs, what went wrong."""
    from dbtrain.coordinator.status import preparation
    from dbtrain.report.facts import gather
    from dbtrain.report.page import write_page
    from dbtrain.report.verdict import judge
    from dbtrain.run.run import Run
    from dbtrain.shards.storage.directory import check_run_path
    from dbtrain.shards.storage.output import check_output

    of, console = Run.at(run), make_console()
    check_run_path(of.store)
    if to is not None:
        check_output("--to", to, lambda name: name.endswith(".html"))
    if under_way := preparation(of):
        say(console, under_way)
        return
    facts = gather(of)
    where = write_page(of, facts, to)
    say(console, judge(facts).headline)
    say(console, f"report of {run} in {where}")
