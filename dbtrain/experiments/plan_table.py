"""The plan command: what would run, where, and what it would take."""

import re
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table

from dbtrain.config import Config
from dbtrain.coordinator.placement import Node, choose_device, place
from dbtrain.coordinator.ray.address import connect, this_machine
from dbtrain.errors import ConfigError
from dbtrain.experiments import capacity
from dbtrain.experiments.baseline import baseline
from dbtrain.experiments.capacity import memory_of
from dbtrain.method.sampler import spaced_levels
from dbtrain.models.adapters import told as adapter
from dbtrain.models.registry import architecture
from dbtrain.run.batch_shape import block_batch
from dbtrain.run.branch import branch_plan
from dbtrain.run.calibrate import announced, described
from dbtrain.run.cost import Estimates
from dbtrain.run.disk import needs
from dbtrain.run.plan import RunPlan, load_data
from dbtrain.run.prepare import check_alone, plan_run
from dbtrain.run.requests import Request, requests
from dbtrain.run.run import BRANCH
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.console import LiveView, size
from dbtrain.telemetry.layout import say, show_table
from dbtrain.training.optimizer import long_warmup

NODE = re.compile(r"((?P<count>[1-9]\d*)x)?(?P<has>[A-Za-z_]\w*=\d+(\.\d+)?(,[A-Za-z_]\w*=\d+(\.\d+)?)*)")
MOST_NODES = 10_000
UNITS = "total: peak memory of one worker, estimated (docs/benchmarks.md: how well); FLOPs/step: of one effective batch"
NOTHING_KEPT = "nothing of the run itself is trained, and nothing is kept: dbtrain train measures the same range again"


def show_plan(
    config: Config, console: Console, notices: Console, memory: str | None = None, imagined: Sequence[str] = ()
) -> None:
    """Print blocks, layers, ranges, estimated memory beside end-to-end, and placement.

    Args:
        config: configuration of the run.
        console: console for the plan.
        notices: console for notices of what takes a while.
        memory: of the GPU that it is for, as in ``80GiB``; by default that of this machine's first one.
        imagined: nodes to plan for in place of those that are there, as in ``2xCPU=32,GPU=4``.

    Raises:
        DbtrainError: the configuration, the data or the cluster do not fit.
    """
    if advice := long_warmup(config.training):
        say(notices, advice)
    # what needs neither data nor a pilot comes first
    bytes_there = memory_of(memory)
    check_alone(config)
    if imagined and config.cluster.address is not None:
        raise ConfigError(f"--node and cluster.address={config.cluster.address} name two clusters: give one of them")
    nodes = imagined_nodes(imagined) or _nodes(config)
    wanted = requests(config, choose_device(config.cluster.device, nodes))
    where = place(wanted, nodes)
    data = load_data(config)
    for note in data.notes:
        say(console, f"data: {note}")
    with LiveView(notices) as view:
        calibrate = announced(view.tell, NOTHING_KEPT, view.count)
        run_plan = plan_run(config, data, calibrate)
        together = baseline(config)
        whole = plan_run(together.config, data, calibrate)
    table = _empty_table(run_plan)
    if config.init.branch:
        branch = branch_plan(run_plan)
        _row(table, BRANCH, Estimates(branch), requests(branch.config, wanted[0].device)[0], "first")
        table.add_section()
    estimates = Estimates(run_plan)
    for request in wanted:
        at = where[request.block]
        _row(table, str(request.block), estimates, request, "waits" if at is None else ", ".join(at))
    table.add_section()
    _row(table, "end-to-end", Estimates(whole), requests(together.config, wanted[0].device)[0], "")
    show_table(console, table)
    for line in (*adapter.lines(run_plan.model(0, "meta")), *_looped(run_plan, whole)):
        say(console, line)
    for line in (*_slices(run_plan), *described(run_plan.distribution), *_measured(run_plan)):
        say(console, line)
    for line in run_plan.init.lines() if run_plan.init else ():
        say(console, f"init: {line}")
    for line in needs(run_plan, Store(config.run_url), at_once=sum(at is not None for at in where.values())):
        say(console, line)
    say(console, UNITS)
    alone = requests(together.config, wanted[0].device)[0]
    micro_batch = block_batch(whole.config.training, 0, 1, alone.micro_batch).micro_batch
    for line in capacity.lines(config, data, whole, micro_batch, bytes_there, wanted[0].device):
        say(console, line)
    blocks = "branch and blocks" if config.init.branch else "blocks"
    say(console, f"FLOPs of all steps: {blocks} {together.budget:.4g}, end-to-end {together.flops:.4g}")


def _empty_table(run_plan: RunPlan) -> Table:
    """Title and columns; :func:`_row` fills them."""
    config = run_plan.config
    table = Table(title=f"{config.name}: {config.blocks} isolated blocks of {config.model.depth} layers")
    sizes = ("params", "weights", "grads", "optim", "EMA", "activ.", "total")
    for name in ("block", "layers", run_plan.noise().level_name, *sizes, "steps", "batch", "FLOPs/step", "goes to"):
        table.add_column(name, justify="right", overflow="fold")
    return table


def _looped(run_plan: RunPlan, whole: RunPlan) -> Iterator[str]:
    """How deep blocks with looped layers are, and in which order they apply them; nothing without loops."""
    if run_plan.config.model.loops is None:
        return
    applied = {f"block {shard}": run_plan.applied(shard) for shard in range(run_plan.shards.blocks)}
    for name, layers in {**applied, "end-to-end": whole.applied(0)}.items():
        numbers = " ".join(map(str, layers))
        yield f"loops: {name} has {len(set(layers))} layers and is {len(layers)} deep, applied as {numbers}"


def _slices(run_plan: RunPlan) -> Iterator[str]:
    """One line for each block: its slice, the share of the training levels in it, and its steps of a
    sampler."""
    if run_plan.distribution["kind"] == "none":
        return
    noise, ranges, section = run_plan.noise(), run_plan.ranges, run_plan.config.evaluation
    levels: Sequence[float] = ()
    if architecture(run_plan.config.model.arch).samples:
        levels = spaced_levels(noise, ranges, section.steps, section.spacing)
    owners = [ranges.owner(level) for level in levels]
    for block in range(ranges.blocks):
        low, high = ranges.of(block)
        below, upto = noise.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
        parts = [f"{noise.level_name} {low:.4g}-{high:.4g}", noise.in_other_terms(low, high)]
        parts.append(f"{100 * (upto - below):.3g} % of the draws")
        parts.append(f"{owners.count(block)} of {len(owners)} solver steps" if owners else "")
        yield f"slice {block}: {', '.join(part for part in parts if part)}"


def _measured(run_plan: RunPlan) -> Iterator[str]:
    """How to use again what the pilots measured."""
    if run_plan.config.noise.ranges == "calibrated" and run_plan.distribution["kind"] != "none":
        edges = ",".join(map(repr, run_plan.ranges.edges))
        yield f"to train with this very range and measure it no more: noise.ranges=explicit noise.edges=[{edges}]"


def _row(table: Table, name: str, estimates: Estimates, request: Request, place_: str) -> None:
    run_plan, block = estimates.run_plan, request.block
    training = run_plan.config.training
    shape = block_batch(training, block, request.workers, request.micro_batch)
    memory = estimates.of(block, shape.micro_batch, request.workers)
    layers, (low, high) = run_plan.shards.layers(block), run_plan.levels(block)
    parts: Sequence[int] = (
        memory.parameters,
        memory.gradients,
        memory.optimizer,
        memory.average,
        memory.activations,
        memory.total,
    )
    table.add_row(
        name,
        f"{layers.start}-{layers.stop - 1}",
        "-" if run_plan.distribution["kind"] == "none" else f"{low:.4g}-{high:.4g}",
        _count(memory.count),
        *(size(part) for part in parts),
        str(training.of_block(block).steps),
        str(shape.batch_size),
        f"{memory.flops * shape.accumulation * shape.workers:.3g}",
        place_,
    )


def imagined_nodes(texts: Sequence[str]) -> list[Node]:
    """Nodes of a cluster that is not here.

    Args:
        texts: what nodes have, by Ray's names, each with how many there are of the kind if more than one.

    Raises:
        ConfigError: a text is something else.
    """
    nodes: list[Node] = []
    for text in texts:
        found = NODE.fullmatch(text.replace(" ", ""))
        if not found:
            raise ConfigError(f"--node {text} is no node: write what it has, as in CPU=32,GPU=4 or 2xCPU=32,GPU=4")
        pairs = (part.split("=") for part in found["has"].split(","))
        resources = {name: float(amount) for name, amount in pairs}
        if lower := [name for name in resources if name.upper() in ("CPU", "GPU") and name != name.upper()]:
            raise ConfigError(
                f"--node {text}: Ray writes {lower[0].upper()} in capitals, and {lower[0]} is another name"
            )
        if len(nodes) + int(found["count"] or 1) > MOST_NODES:
            raise ConfigError(f"--node {text}: more than {MOST_NODES:,} nodes cannot be planned; give fewer")
        nodes += [Node(f"node {len(nodes) + i}", resources) for i in range(int(found["count"] or 1))]
    return nodes


def _nodes(config: Config) -> list[Node]:
    if config.cluster.address is None:
        return [this_machine()]
    cluster = connect(config.cluster.address)
    try:
        return cluster.nodes()
    finally:
        cluster.close()


def _count(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"
