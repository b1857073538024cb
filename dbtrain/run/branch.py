"""The branch of a run: one block-sized network that learns all levels first,
and from which every block starts.

It is a run of its own in the directory ``branch`` of the run. It has one block, and commits, attempts and
resumes as any other run. Experts for noise levels that start as copies of one network are known  #
eDiff-I, section 4.1
"""

from collections.abc import Callable
from dataclasses import replace

from dbtrain.config import Config
from dbtrain.errors import ConfigError, ShardError
from dbtrain.method.draws import derive_seed
from dbtrain.method.ranges import Ranges
from dbtrain.method.split import LayerSplit
from dbtrain.run.initial_weights import InitialWeights, store_of
from dbtrain.run.plan import RunPlan
from dbtrain.run.run import BRANCH, Run
from dbtrain.run.schedule import first_training
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.origin import Origin


def branch_plan(run_plan: RunPlan) -> RunPlan:
    """The plan of a run's branch: the layers of one block, with the run's whole range, codebook and data.

    Raises:
        ConfigError: the run has no branch, or its blocks are not of the same depth.
    """
    depth = common_depth(run_plan.split)
    edges = run_plan.ranges.edges
    # the training section from before any extension: extending the blocks does not extend the branch
    training = first_training(run_plan.config.training, run_plan.extensions)
    return replace(
        run_plan,
        config=branch_config(run_plan.config.model_copy(update={"training": training}), depth),
        extensions=(),
        split=LayerSplit((0, depth)),
        ranges=Ranges((edges[0], edges[-1])),
        init=None,  # the run itself has an origin once its branch is done
    )


def branch_config(config: Config, depth: int) -> Config:
    """The configuration of the branch of a run, a network of `depth` layers.

    Its schedule is that of a block over the branch's steps. Its seed differs from the run's:
    otherwise block 0 would see the same samples in the same order a second time.
    """
    assert config.init.branch is not None, "asked of a run that has one"
    noise = config.noise
    if noise.edges:
        noise = noise.model_copy(update={"edges": (noise.edges[0], noise.edges[-1])})
    return config.model_copy(
        update={
            "name": BRANCH,
            "out": config.run_url,
            "seed": derive_seed(config.seed, BRANCH) >> 32,
            "blocks": 1,
            "layers_per_block": None,
            "model": config.model.model_copy(update={"depth": depth, "loops": _loops(config, depth)}),
            "noise": noise,
            "init": type(config.init)(),
            "training": config.training.over(config.init.branch.steps).model_copy(update={"blocks": {}}),
            "cluster": config.cluster.model_copy(update={"blocks": {}}),
        }
    )


def _loops(config: Config, depth: int) -> tuple[int, ...] | None:
    """How often the branch applies each of its layers: as often as every block does.

    Raises:
        ConfigError: the blocks differ in that.
    """
    loops = config.model.loops
    if loops is None:
        return None
    patterns = sorted({loops[start : start + depth] for start in range(0, len(loops), depth)})
    if len(patterns) > 1:
        raise ConfigError(
            f"init.branch copies one network into every block, and model.loops={list(loops)} gives the blocks "
            f"{' and '.join(str(list(pattern)) for pattern in patterns)}: give all of them the same counts"
        )
    return patterns[0]


def common_depth(split: LayerSplit) -> int:
    """Number of layers that every block has.

    Raises:
        ConfigError: the blocks have different numbers of layers.
    """
    sizes = split.sizes
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"init.branch copies one network into every block, and the blocks have {', '.join(map(str, sizes))} "
            f"layers: give all of them as many, with a model.depth that is a multiple of blocks={split.blocks} and "
            "without layers_per_block"
        )
    return sizes[0]


def awaits_branch(run: Run) -> bool:
    """Whether some block has not begun, and the branch is not done yet, or not yet noted in run.json."""
    if not run.config.init.branch or (run.branch.exists and run.branch.block(0).done and _is_noted(run)):
        return False
    return any(block.committed == 0 for block in run.blocks)


def _is_noted(run: Run) -> bool:
    """Whether the files that run.json names are there: a command may have ended before it noted them."""
    origin = run.manifest.init
    return origin is not None and all(map(store_of(run, origin).exists, origin.files))


def start_from_branch(run: Run, report: Callable[[str], None]) -> Origin:
    """Note in run.json which weights the blocks start from,
    once the branch is done: its averaged weights, if it has them.

    Args:
        run: the whole run.
        report: gets a line if the blocks that have begun started from other weights.

    Raises:
        ShardError: the branch is damaged, or the storage fails.
    """
    branch = run.branch.block(0)
    if not branch.done:
        raise ShardError(f"{branch.store.url} lost the last checkpoint of the branch: the same command trains it again")
    source = WeightSource.open(run.branch.store.url)
    origin = InitialWeights.of(run.plan, source, "repeat").origin
    # The place is relative to the run's directory, which may be moved or copied with its branch in it. The
    # notes are left out: the branch's weights mean the same here, although keys of the model that follow from
    # the depth differ.
    origin = replace(origin, place=source.store.url.removeprefix(f"{run.store.url}/"), notes=())
    before = run.manifest.init
    if before is not None and set(before.files.values()) != set(origin.files.values()):
        report(
            "the branch was trained again and ended in other bits: blocks that have begun started from the one before"
        )
    run.record(replace(run.manifest, init=origin))
    return origin
