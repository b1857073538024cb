"""The plan command: what would run, where, and what it would take."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dbtrain.config import Config
from dbtrain.coordinator.placement import Node, choose_device, place
from dbtrain.coordinator.ray.address import connect, this_machine
from dbtrain.experiments.baseline import end_to_end
from dbtrain.run.batch_shape import cut_batch
from dbtrain.run.calibrate import announced, described
from dbtrain.run.cost import Memory, estimate
from dbtrain.run.make_plan import design
from dbtrain.run.plan import RunPlan, load_data
from dbtrain.run.prepare import check_alone, check_before_pilot, weight_source, with_weights
from dbtrain.run.requests import Request, requests
from dbtrain.run.weight_meaning import codes_of
from dbtrain.telemetry.console import LiveView, size
from dbtrain.telemetry.layout import say, show_table
from dbtrain.training.optimizer import endless_warmup

NOTHING_KEPT = "nothing of the run itself is trained, and nothing is kept: dbtrain train measures the same range again"


def show_plan(config: Config, console: Console, notices: Console) -> None:
    """Print blocks, layers, ranges, estimated memory beside end-to-end, and placement.

    Args:
        config: of the run.
        console: for the plan.
        notices: for what takes a while.

    Raises:
        DbtrainError: the configuration, the data or the cluster do not fit.
    """
    if advice := endless_warmup(config.training):
        say(notices, advice)
    # what needs neither data nor a pilot comes first
    check_alone(config)
    nodes = _nodes(config)
    wanted = requests(config, choose_device(config.cluster.device, nodes))
    where = place(wanted, nodes)
    data = load_data(config)
    for note in data.notes:
        say(console, f"data: {note}")
    with LiveView(notices) as view:
        calibrate = announced(view.tell, NOTHING_KEPT, view.count)
        source = weight_source(config)
        check_before_pilot(config, data, calibrate, source)
        run_plan = with_weights(design(config, data, calibrate, codes_of(source, config)), source)
        whole_config = end_to_end(config)
        whole = design(whole_config, data, calibrate)
    table = Table(title=f"{config.name}: {config.blocks} isolated blocks of {config.model.depth} layers")
    columns = (
        "block",
        "layers",
        run_plan.noise().level_name,
        "params",
        "weights",
        "grads",
        "optim",
        "EMA",
        "activ.",
        "total",
        "FLOPs/step",
    )
    for name in (*columns, "goes to"):
        table.add_column(name, justify="right", overflow="fold")
    for request in wanted:
        at = where[request.block]
        _row(table, str(request.block), run_plan, request, "waits" if at is None else ", ".join(at))
    table.add_section()
    _row(
        table, "end-to-end", whole, requests(whole_config, wanted[0].device)[0], f"{whole_config.training.steps} steps"
    )
    show_table(console, table)
    for line in described(run_plan.distribution):
        say(console, line)
    for line in run_plan.init.lines() if run_plan.init else ():
        say(console, f"init: {line}")
    say(console, "memory of one worker, estimated: allocator and kernels add to it; FLOPs of an effective batch")


def _row(table: Table, name: str, run_plan: RunPlan, request: Request, place_: str) -> None:
    shape = cut_batch(run_plan.config.training.batch_size, request.workers, request.micro_batch)
    block = request.block
    memory: Memory = estimate(run_plan, block, shape.micro_batch, request.workers)
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
        f"{memory.flops * shape.accumulation * shape.workers:.3g}",
        place_,
    )


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
