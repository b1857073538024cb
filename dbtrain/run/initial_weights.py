"""Which of a source's tensors each block starts from, settled from headers before anything is written."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from dbtrain.errors import ConfigError, ShardError
from dbtrain.method.split import PRIVATE_GROUPS, LayerSplit
from dbtrain.models.adapters.names import from_file, is_added, original_name, our_name
from dbtrain.models.registry import architecture
from dbtrain.run.plan import RunPlan
from dbtrain.run.run import Run
from dbtrain.run.weight_meaning import notes
from dbtrain.run.weight_misfit import Shape, misfit
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.frozen import frozen_hash_of
from dbtrain.shards.origin import BlockOrigin, Origin
from dbtrain.shards.storage.store import Store
from dbtrain.shards.tensor_file import read_header, read_tensors

Layers = Literal["slice", "repeat"]


@dataclass(frozen=True)
class InitialWeights:
    """What the blocks of a run take of a source; :meth:`of` makes and checks it."""

    source: WeightSource
    origin: Origin
    """The record of the origin that run.json keeps."""
    frozen_names: Mapping[str, str]
    """Names in the source of the parts that no block trains, by their names in a block's model."""

    @staticmethod
    def of(run_plan: RunPlan, source: WeightSource, layers: Layers) -> "InitialWeights":
        """Settle who takes what. Headers are read, and values only of what is to be frozen.

        Raises:
            ConfigError: the source does not fit the run: its depth, its names and shapes (all that misfit),
                or several stems where one is to be frozen.
            ShardError: its files are damaged or out of reach.
        """
        check_layers(run_plan.shards, layers)
        source = in_our_names(run_plan, source)
        shards = range(run_plan.shards.blocks)
        shapes = [_shapes(run_plan, shard) for shard in shards]
        rows = [_row(run_plan, source, layers, shard) for shard in shards]
        frozen = _frozen_names(run_plan, source, shapes[0])
        starts, foreign = [run_plan.shards.layers(s).start for s in shards], bool(source.originals)
        taken = [_taken(row, shapes[s], starts[s], foreign) for s, row in enumerate(rows)]
        wanted = {name: shape for shard in taken for name, shape in shard.items()}
        wanted |= {name: shapes[0][own] for own, name in frozen.items()}
        called = _as_its_library(run_plan, source)
        if wrong := misfit(called(wanted), called(source.tensors), _others(source, rows, frozen)):
            of_another = _of_another_class(run_plan, source)
            raise ConfigError(
                f"init.from={source.asked}{of_another} does not fit this run: {wrong}: take weights of the network "
                "that the section model describes, or set that to what they are of"
            )
        rows = [replace(row, files=_files(source, names)) for row, names in zip(rows, taken, strict=True)]
        files = sorted({*(name for row in rows for name in row.files), *_files(source, frozen.values())})
        hashes = {name: source.hashes[name] for name in files}
        told = notes(run_plan, source)
        origin = Origin(source.store.url, hashes, tuple(rows), told, foreign=bool(source.originals))
        return InitialWeights(source, origin, frozen)

    def frozen(self) -> dict[str, Tensor]:
        """The parts that no block trains, float32, by their names in a block's model.

        Raises:
            ShardError: they are damaged or out of reach.
        """
        return _read(self.source, {name: own for own, name in self.frozen_names.items()})


def as_its_source(run_plan: RunPlan, source: WeightSource, layers: Layers) -> RunPlan:
    """The plan of a new run; if the source fits only without what the plan settled, the plan without that.

    A network from before widths were settled may have hidden widths that a new run would round. A run that
    starts from it keeps those widths.
    """
    before = replace(run_plan, settled={})
    fits_before_only = run_plan.settled and not _fits(run_plan, source, layers) and _fits(before, source, layers)
    return before if fits_before_only else run_plan


def _fits(run_plan: RunPlan, source: WeightSource, layers: Layers) -> bool:
    try:
        InitialWeights.of(run_plan, source, layers)
    except ConfigError:
        return False
    return True


def read_block(
    run: Run, origin: Origin, shard: int, first_layer: int, wanted: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """First weights of one block, float32, one tensor after the other, from the files that hold them.

    Args:
        run: the run that starts.
        origin: where its weights come from.
        shard: number of the block.
        first_layer: number of the block's first layer in the run's whole model.
        wanted: names in the block's model. Names that the source does not have are skipped:
            :meth:`InitialWeights.of` has already refused a source without a tensor that is needed.

    Raises:
        MissingError: a file is gone.
        DamagedError: a file is not the one that the run was started with, or holds NaN or infinity.
    """
    row, store = origin.blocks[shard], store_of(run, origin)
    names = {row.source_name(name, first_layer): name for name in wanted if not _is_new(origin, shard, name)}
    for file in row.files:
        called = names
        if origin.foreign:
            there = _our_names(run.config.model.arch, read_header(store, file).tensors)
            called = {original: names[ours] for ours, original in there.items() if ours in names}
        yield from read_tensors(store, file, origin.files[file], called)


def new_names(origin: Origin, shard: int, names: Iterable[str]) -> set[str]:
    """The parameters of a block that the source does not have, which keep their random or zero values: what
    was added to a network of another library."""
    return {name for name in names if _is_new(origin, shard, name)}


def _is_new(origin: Origin, shard: int, name: str) -> bool:
    row = origin.blocks[shard]
    taken = {"stem": row.stem, "head": row.head}.get(name.split(".", 1)[0], "layers")
    return is_added(name) and (origin.foreign or not taken)


def store_of(run: Run, origin: Origin) -> Store:
    """Directory of the files that a run's first weights are read from."""
    own = not origin.place.startswith("/") and "://" not in origin.place
    return run.store.child(origin.place) if own else Store(origin.place)


def check_there(run: Run, only: Collection[int] | None = None) -> None:
    """Refuse to start workers that would not find their first weights.

    Args:
        run: a prepared run. Its branch is not looked for, since a branch that is gone is trained again.
        only: the blocks that are to be trained; None for all. Blocks with a commit need no first weights.

    Raises:
        ShardError: a file of the source is gone, or the storage cannot be reached.
    """
    origin = run.manifest.init
    if origin is None or run.config.init.branch:
        return
    store = store_of(run, origin)
    for block in run.blocks:
        if (only is None or block.number in only) and not block.committed:
            gone = [file for file in origin.blocks[block.number].files if not store.exists(file)]
            if gone:
                raise ShardError(
                    f"init.from: {store.where(gone[0])} is gone, from which {block.name} starts: put it back (its "
                    f"SHA-256 is {origin.files[gone[0]]}), or start another run"
                )


def check_layers(split: LayerSplit, layers: Layers) -> None:
    """Refuse blocks of different depths if all of them start from the same layers.

    Raises:
        ConfigError: the depths differ; the message names them.
    """
    depths = split.sizes
    if layers == "repeat" and len(set(depths)) > 1:
        raise ConfigError(
            "init.layers=repeat starts every block from all layers of one network, and the blocks have "
            f"{', '.join(map(str, depths))} layers: choose a model.depth that blocks={split.blocks} divides, without "
            "layers_per_block"
        )


def in_our_names(run_plan: RunPlan, source: WeightSource) -> WeightSource:
    """The source by the names of our shards, if it is of another library's class that `model.arch` names."""
    arch = run_plan.config.model.arch
    ours = bool(source.blocks) or any(name.startswith("stem.") for name in source.tensors)
    if architecture(arch).stack is None or ours or source.originals:
        return source
    unread = getattr(getattr(run_plan.model(0, "meta"), "cut_as", None), "unread", lambda name: False)
    originals = _our_names(arch, [name for name in source.tensors if not unread(name)])
    tensors = {our: source.tensors[original] for our, original in originals.items()}
    return replace(source, tensors=tensors, originals=originals)


def _of_another_class(run_plan: RunPlan, source: WeightSource) -> str:
    """A clause on the class of a source that is of another class than the run's; else ''."""
    stack = architecture(run_plan.config.model.arch).stack
    known = ("", stack.original if stack else "")
    return "" if source.of_class in known else f", which is of {source.of_class},"


def _our_names(arch: str, names: Iterable[str]) -> dict[str, str]:
    """Names in files of another library's class, by ours."""
    stack = architecture(arch).stack
    return {our_name(stack, from_file(stack, name)): name for name in names}


def _as_its_library(run_plan: RunPlan, source: WeightSource) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that renames the keys of a mapping to the names in the source's library, for messages."""
    stack = architecture(run_plan.config.model.arch).stack

    def called(by_name: Mapping[str, Any]) -> dict[str, Any]:
        if not source.originals:
            return dict(by_name)
        return {original_name(stack, name): value for name, value in by_name.items()}

    return called


def _shapes(run_plan: RunPlan, shard: int) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in run_plan.model(shard, "meta").named_parameters()}


def _row(run_plan: RunPlan, source: WeightSource, layers: Layers, shard: int) -> BlockOrigin:
    """Layers, stem and head that a block takes; its files are not known yet."""
    own, found = run_plan.shards.layers(shard), source.layers
    if found:  # without any layer found, the names say more than a count
        _check_depth(found, layers, len(own), run_plan, source)
    first = found[0] if found and layers == "repeat" else own.start
    taken, frozen = range(first, first + len(own)), run_plan.config.init.frozen
    stem = "" if "stem" in frozen else source.prefix("stem", taken[0])
    head = "" if "head" in frozen else source.prefix("head", taken[-1])
    return BlockOrigin((taken.start, taken.stop), stem, head, ())


def _check_depth(found: list[int], layers: Layers, own: int, run_plan: RunPlan, source: WeightSource) -> None:
    depth = run_plan.config.model.depth
    has = f"init.from={source.asked} has {len(found)} layers ({found[0]}-{found[-1]})"
    if layers == "repeat" and len(found) != own:
        raise ConfigError(
            f"init.layers=repeat starts every block from all layers of a network of a block's depth, which is {own} "
            f"here (model.depth={depth}), and {has}: take a network of {own} layers, or init.layers=slice for one of "
            f"{depth}"
        )
    if layers == "slice" and found != list(range(depth)):
        raise ConfigError(
            f"init.layers=slice gives each block its own layers of a network of the same depth, which is "
            f"model.depth={depth}, and {has}: take a network of {depth} layers, or init.layers=repeat for one of a "
            "block's depth"
        )


def _taken(row: BlockOrigin, shapes: Mapping[str, Shape], first_layer: int, foreign: bool) -> dict[str, Shape]:
    """Shapes of what a block trains, by the names in the source."""
    own = {group for group, prefix in (("stem", row.stem), ("head", row.head), ("layers", "layers")) if prefix}
    wanted = {n: shape for n, shape in shapes.items() if not (foreign and is_added(n))}
    return {row.source_name(n, first_layer): shape for n, shape in wanted.items() if n.split(".", 1)[0] in own}


def _files(source: WeightSource, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({source.tensors[name].file for name in names}))


def _others(source: WeightSource, rows: list[BlockOrigin], frozen: Mapping[str, str]) -> set[str]:
    """Names of stems and heads of the source's blocks that no block of this run takes."""
    private = {prefix for group in PRIVATE_GROUPS for prefix in source.prefixes(group).values()}
    used = {prefix for row in rows for prefix in (row.stem, row.head)}
    used |= {".".join(name.split(".")[:3]) for name in frozen.values()}
    return {name for name in source.tensors if ".".join(name.split(".")[:3]) in private - used}


def _frozen_names(run_plan: RunPlan, source: WeightSource, shapes: Mapping[str, Shape]) -> dict[str, str]:
    prefixes = {group: _common_prefix(source, group) for group in run_plan.config.init.frozen}
    parts = [(name, *name.split(".", 1)) for name in shapes if not is_added(name)]
    return {name: f"{prefixes[group]}.{rest}" for name, group, rest in parts if group in prefixes}


def _common_prefix(source: WeightSource, group: str) -> str:
    """What the names of the source's one stem or head begin with.

    Raises:
        ConfigError: it has several that differ.
    """
    private = source.prefixes(group)
    if any(name.startswith(f"{group}.") for name in source.tensors) or not private:
        return group
    hashes = {_hash(source, f"{prefix}.") for prefix in private.values()} if len(private) > 1 else set()
    if len(hashes) > 1:
        raise ConfigError(
            f"init.{group}=frozen keeps one {group} for all blocks, and blocks {', '.join(map(str, private))} of "
            f"init.from={source.asked} have {group}s that differ: set init.{group}=private, or take a network with one"
        )
    return next(iter(private.values()))


def _hash(source: WeightSource, prefix: str) -> str:
    names = {name: name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix)}
    return frozen_hash_of(_read(source, names))


def _read(source: WeightSource, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of the source under other names."""
    files, there = _files(source, names), {source.originals.get(name, name): own for name, own in names.items()}
    return {own: t for file in files for own, t in read_tensors(source.store, file, source.hashes[file], there)}
