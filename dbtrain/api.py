"""The Python interface: what the commands of ``dbtrain`` do, as functions.

Each function is also a name of the package, as in ``dbtrain.train``. The command line calls the same ones and
adds what people read. None of them prints: a program that wants to see what happens gives a view, such as
``dbtrain.live_view()``. A user's mistake raises a `DbtrainError` that says what is wrong, the value and the
fix, as does an argument of the wrong type, whose `ArgumentError` is a TypeError too; any other exception is a
bug.

A run is given as its directory or URL (``out/name``), or as the `Run` that `prepare` and `train` return.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from dbtrain.config import Config, EvaluationConfig, load_config
from dbtrain.config.overrides import check_overrides
from dbtrain.coordinator.pipeline_hosts import open_hosts
from dbtrain.coordinator.status import BlockStatus
from dbtrain.coordinator.status import status as read_status
from dbtrain.coordinator.train import train as train_blocks
from dbtrain.errors import ConfigError, refuse_argument
from dbtrain.evaluation.merged_network import MergedNetwork
from dbtrain.evaluation.merged_network import load_merged as read_merged
from dbtrain.evaluation.metrics import Metric
from dbtrain.evaluation.report import Scores, evaluate_run
from dbtrain.evaluation.verify import merge_and_verify
from dbtrain.run.calibrate import announced, described
from dbtrain.run.continued import moved, run_config
from dbtrain.run.merge import MergeResult
from dbtrain.run.run import Run
from dbtrain.run.seal import seal
from dbtrain.shards.storage.directory import check_run_path
from dbtrain.telemetry.console import LiveView, SilentView, View, make_console

__all__ = [
    "Config",
    "Evaluation",
    "MergedNetwork",
    "Run",
    "evaluate",
    "live_view",
    "load_config",
    "load_merged",
    "merge",
    "predict",
    "prepare",
    "run_config",
    "status",
    "train",
]

RunAt = Run | str | os.PathLike[str]
"""A run, or where it lies."""

PILOTS = "once in a run, which keeps the range in run.json"


def live_view() -> LiveView:
    """A view that shows what the command shows; use it in a ``with`` statement."""
    return LiveView(make_console())


def _at(run: RunAt, name: str = "run", wanted: str = "a run, or its directory or URL as a text") -> Run:
    """The run that an argument of this name gives; `wanted` is what may be given, in words."""
    if not isinstance(run, Run | str | os.PathLike):
        refuse_argument(name, run, wanted)
    return run if isinstance(run, Run) else Run.at(os.fspath(run))


def _checked_blocks(blocks: Collection[int] | None) -> list[int] | None:
    if blocks is None:
        return None
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Collection):
        refuse_argument("blocks", blocks, "a list of their numbers, as in blocks=[0, 1]")
    for number, block in enumerate(blocks):
        if isinstance(block, bool) or not isinstance(block, Integral):
            refuse_argument(f"blocks[{number}]", block, "the number of a block, as in blocks=[0, 1]")
    return [int(block) for block in blocks]


def prepare(config: Config, view: View | None = None) -> Run:
    """Seal a run without training it: its range is measured, its blocks are planned, and run.json is written.

    A run that is there already is checked against the configuration. `train` prepares a run by itself; call
    this where blocks are to be trained in places that share nothing.

    Raises:
        ConfigError: the folder belongs to a run of another configuration, or no worker could train this one.
        DataError: the data cannot be read, or is not what the run was sealed with.
        ShardError: the storage fails.
        RunLockedError: another command works on this run.
    """
    if not isinstance(config, Config):
        refuse_argument("config", config, "a configuration, as load_config returns")
    shown = view or SilentView()
    run_plan = seal(config, announced(shown.tell, PILOTS, shown.count))
    for line in (*(f"data: {note}" for note in run_plan.data_notes), *described(run_plan.distribution)):
        shown.tell(line)
    return Run.at(config.run_url)


def train(
    config: Config | RunAt,
    *,
    blocks: Collection[int] | None = None,
    address: str | None = None,
    view: View | None = None,
    verbose: bool = False,
) -> Run:
    """Train the blocks of a run, each on its own worker; those that are done already are left as they are.

    It returns when all blocks that were asked for are done. In the main thread of a program SIGINT, SIGTERM
    and SIGUSR1 make the workers commit and leave; call it again to continue.

    Args:
        config: configuration of a run; or a run that was prepared or begun, which goes on with its own
            configuration.
        blocks: numbers of the blocks to train; all for None, and none but the branch if it is empty.
        address: address of a Ray cluster: ``auto``, ``host:port`` or ``ray://host:port``; by default the
            configuration's ``cluster.address``; without one Ray is started on this machine for this call.
        view: is shown what happens.
        verbose: show every time-out that is in force too.

    Raises:
        ConfigError: there is no such block, or the configuration fits neither the data nor the run.
        PlacementError: no cluster answers, or no node of it can hold a block.
        IncompleteRunError: blocks failed or were stopped; the message names each.
        DbtrainError: the run cannot start; the message says why.
    """
    wanted, shown = _checked_blocks(blocks), view or SilentView()
    if not isinstance(address, str | None):
        refuse_argument("address", address, "a text such as 'auto' or 'host:6379'")
    chosen = (
        config
        if isinstance(config, Config)
        else run_config(_at(config, "config", "a configuration, a run, or the directory or URL of one").store.url)
    )
    if address is not None:
        chosen = chosen.model_copy(update={"cluster": chosen.cluster.model_copy(update={"address": address})})
    train_blocks(chosen, shown, announced(shown.tell, PILOTS, shown.count), verbose, wanted)
    return Run.at(chosen.run_url)


def status(run: RunAt) -> list[BlockStatus]:
    """What each block of a run is doing, from the files of the run alone.

    Raises:
        ShardError: it is no run, or its manifest is damaged.
    """
    found = _at(run)
    check_run_path(found.store)
    return read_status(found)


@dataclass(frozen=True)
class Merged:
    """What `merge` made."""

    result: MergeResult
    """Where the merged model lies, its blocks and their checkpoints, and the number of its parameters."""
    samples: int
    """Test samples on which it equals the blocks bit for bit."""


def merge(
    run: RunAt,
    overrides: Sequence[str] = (),
    *,
    config: Config | None = None,
    now: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Put the blocks together, and verify on test samples that the merged model is the blocks.

    A merged model exists only once it was verified; an older one stays until then.

    Args:
        run: a run whose blocks are done.
        overrides: where the data lies now, such as ``data.path=/elsewhere``; by default where run.json says.
        config: configuration of the run with its data where it lies now, for a program that has one; without
            `overrides`.
        now: take blocks that are not done as far as they are; the run may be training.
        tell: gets a line for each damaged checkpoint that is passed over.

    Raises:
        ConfigError: an override is of something else.
        IncompleteRunError: blocks are not done.
        ShardError: a shard is damaged or foreign, or the merged model does not pass the check.
        DataError: the test samples cannot be read.
    """
    check_overrides(overrides)
    found = _at(run)
    located = moved(found.store.url, overrides) if overrides else config
    return Merged(*merge_and_verify(found, located, now, tell))


@dataclass(frozen=True)
class Evaluation:
    """Scores of a merged model."""

    metric: Metric
    """What was measured; its `label` names it, and `better` says which way."""
    scores: Scores
    """The scores by split (``validation``, ``test``) and readout."""
    progress: str = ""
    """How far the blocks were trained, if they are not done."""


def evaluate(
    run: RunAt,
    overrides: Sequence[str] = (),
    *,
    section: EvaluationConfig | None = None,
    view: View | None = None,
    shown: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Evaluation:
    """Score the merged model of a run by every readout; also written to ``evaluation.json`` of the run.

    Args:
        run: a run that is merged.
        overrides: settings of the section `evaluation`, such as ``evaluation.steps=100``, or of where the
            data lies.
        section: how to evaluate, if not as the run's own configuration says.
        view: is told how far it has come and how long the parts took.
        shown: gets the scores before they are written, so that a full disk does not lose them.

    Raises:
        ConfigError: an override is wrong or of another section.
        ShardError: the run is not merged, its files are damaged, or the scores cannot be written.
    """
    check_overrides(overrides)
    if not isinstance(section, EvaluationConfig | None):
        refuse_argument("section", section, "an EvaluationConfig, or overrides=['evaluation.steps=100']")
    watched = view or SilentView()
    found: list[Evaluation] = []

    def show(metric: Metric, scores: Scores, progress: str) -> None:
        found.append(Evaluation(metric, scores, progress))
        shown(found[-1])

    evaluate_run(_at(run), overrides, section, show, count=watched.count, tell=watched.tell, hosts=open_hosts)
    return found[-1]


def load_merged(path: RunAt, device: str | torch.device = "cpu") -> MergedNetwork:
    """The merged model of a run as one PyTorch module, in eval mode; see `MergedNetwork` for what it takes.

    Every file is verified by its hash. A network of the user's own is imported again by its path.

    Args:
        path: the run, or the directory or URL of a merged model by itself.
        device: where the blocks are put.

    Raises:
        ShardError: there is no merged model, or a file of it is damaged.
        ConfigError: the run's own network cannot be imported, or there is no such device.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is no device of PyTorch: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device}: PyTorch sees {torch.cuda.device_count()} GPU(s) here; leave it out for the CPU"
        )
    return read_merged(_at(path, "path", "the directory or URL of a run or a merged model").store.url, chosen)


def predict(model: MergedNetwork, inputs: Tensor, batch_size: int = 256) -> Tensor:
    """The model's answers for as many inputs as there are, a batch at a time, without gradients, on the CPU.

    Args:
        model: what `load_merged` returns.
        inputs: N of them, as `MergedNetwork` takes them.
        batch_size: inputs at a time. A model that draws samples has its own, `evaluation.batch_size`.

    Returns:
        The likeliest class (N,), the likeliest next token (N,), tokens (N, L) with their masks filled in, or
        samples (N, C, H, W). Input i is answered alike in batches of any size, but for rounding.

    Raises:
        ConfigError: the inputs do not fit, or `batch_size` is below 1.
    """
    if not isinstance(inputs, torch.Tensor) or not inputs.ndim:
        raise ConfigError(
            f"inputs are a {type(inputs).__name__}: give a tensor of N of them, as torch.as_tensor(...) makes"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is no number of inputs: give 1 or more")
    size = len(inputs) if model.sampling is not None else batch_size
    starts = range(0, max(1, len(inputs)), max(1, size))
    return torch.cat([model.answer(inputs[start : start + size], start).cpu() for start in starts])
