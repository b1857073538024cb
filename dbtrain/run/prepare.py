"""Prepare a run before anything trains: plan it, write codebook and manifest; one that exists is checked.

Every plan of a configuration comes from here: `prepare` makes that of a run, `plan_run` the same without a
directory, and `sketch` one without a pilot.
"""

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from types import MappingProxyType
from typing import Any

import torch

from dbtrain import __version__
from dbtrain.config import Config
from dbtrain.config.data import resolved_paths
from dbtrain.data.splits import DataSet
from dbtrain.errors import ConfigError, first_line
from dbtrain.method.content import tensor_hash
from dbtrain.method.ranges import explicit
from dbtrain.method.schemes import SCHEMES
from dbtrain.models.own_class import check_network
from dbtrain.models.registry import architecture, own_architecture
from dbtrain.run.batch_shape import block_batch, check_augmentation
from dbtrain.run.branch import branch_plan, common_depth
from dbtrain.run.config_diff import but_for_places, difference
from dbtrain.run.cost import flops_of
from dbtrain.run.initial_weights import InitialWeights, as_its_source, check_layers
from dbtrain.run.make_plan import Calibrate, design, split_of, target_of
from dbtrain.run.plan import RunPlan, load_data
from dbtrain.run.requests import requests
from dbtrain.run.run import BRANCH, Run
from dbtrain.run.schedule import in_words, lengths_of, with_lengths
from dbtrain.run.weight_meaning import check_codebook, codes_of
from dbtrain.run.weight_source import WeightSource
from dbtrain.shards.format import encode_codebook
from dbtrain.shards.frozen import FROZEN, encode_frozen, frozen_hash_of
from dbtrain.shards.manifest import Manifest, PlanRow, write_manifest
from dbtrain.shards.merged_directory import CODEBOOK

MEASURED = ("calibrated", "equal_information")
"""Range policies for which a pilot is trained."""


def prepare(config: Config, run: Run, calibrate: Calibrate) -> RunPlan:
    """Write what all blocks have in common and run.json, or check those that are there.

    Raises:
        ConfigError: the directory belongs to a run of another configuration,
            or no worker could train this one.
        ShardError: its files are damaged or the storage fails.
        DataError: the data cannot be read, or is not what the run was started with.
    """
    check_alone(config)
    return prepare_checked(config, run, calibrate)


def prepare_checked(config: Config, run: Run, calibrate: Calibrate) -> RunPlan:
    """The same as `prepare`, for a command that has called `check_alone` before it asked a cluster."""
    if run.exists:
        return _continue(config, run)
    run_plan = plan_run(config, load_data(config), calibrate)
    _seal(run, run_plan)
    return run_plan


def prepare_branch(run: Run, run_plan: RunPlan) -> None:
    """Write what the branch of a prepared run is, in its own directory, or check what is there.

    Args:
        run: the whole run.
        run_plan: plan of its branch.

    Raises:
        ConfigError: another branch is there.
        ShardError: its files are damaged or the storage fails.
    """
    if run.branch.exists:
        _refuse_another(run.branch, run_plan.config)
    else:
        _seal(run.branch, run_plan, {"run": f"{run.manifest.name}/{BRANCH}", "branch": True})


def _seal(run: Run, run_plan: RunPlan, marks: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write codebook and run.json; `marks` are fields of the manifest that only some runs have."""
    code_hash = ""
    if run_plan.frozen:
        run.store.write(FROZEN, encode_frozen(run_plan.frozen))
    if run_plan.codebook is not None:
        run.store.write(CODEBOOK, encode_codebook(run_plan.codebook))
        code_hash = tensor_hash(run_plan.codebook)
    write_manifest(run.store, replace(_manifest(run_plan, code_hash), **marks))


def check_alone(config: Config) -> None:
    """Refuse what is wrong whatever the data, the cluster and the run's directory hold.

    Raises:
        ConfigError: blocks, layers, edges, batch or resources do not fit each other.
    """
    split = split_of(config)
    if config.init.branch:
        common_depth(split)
    check_layers(SCHEMES[config.method].shards(split), config.init.layers)
    if target_of(config) != "hidden" and config.noise.edges:
        explicit(config.noise.edges, config.blocks)
    for request in requests(config, "cpu"):
        block_batch(config.training, request.block, request.workers, request.micro_batch)


def plan_run(config: Config, data: DataSet, calibrate: Calibrate) -> RunPlan:
    """The plan of a run of this configuration on this data; no run directory is read or written.

    Raises:
        ConfigError: no worker could train it, or the weights that it starts from are not for it.
        ShardError: the files of those weights are damaged or out of reach.
    """
    check_augmentation(config.training.augmentation, data.train)
    source = None if config.init.source is None else WeightSource.open(config.init.source)
    codes = codes_of(source, config)
    # without a codebook there is nothing to measure, which the design says
    if config.noise.ranges in MEASURED and architecture(config.model.arch).codes:
        # checked before the pilot, which takes minutes, that the models can be built
        early = sketch(config, data)
        _check_models(early)
        if source is not None:
            layers = config.init.layers
            InitialWeights.of(as_its_source(early, source, layers), source, layers)
    run_plan = replace(
        design(config, data, calibrate, codes),
        data_hash=data.content,
        class_names=data.class_names,
        data_notes=data.notes,
    )
    _check_models(run_plan)
    return run_plan if source is None else _with_weights(run_plan, source)


def _with_weights(run_plan: RunPlan, source: WeightSource) -> RunPlan:
    """The plan with where its first weights come from, and with the parts that no block trains."""
    check_codebook(run_plan, source)
    layers = run_plan.config.init.layers
    run_plan = as_its_source(run_plan, source, layers)
    initial = InitialWeights.of(run_plan, source, layers)
    return replace(run_plan, init=initial.origin, frozen=initial.frozen())


def sketch(config: Config, data: DataSet) -> RunPlan:
    """The plan of a run without its pilot, for what the range does not change: shapes, parameters and FLOPs.

    Ranges that would be measured are uniform, and codes of a corpus, which take a while to make, are random.

    Raises:
        ConfigError: data, codebook and model do not fit each other.
    """
    uniform = {"ranges": "uniform"} if config.noise.ranges in MEASURED else {}
    random = {"source": "random"} if config.codebook.source == "corpus" else {}
    changes = {
        "noise": config.noise.model_copy(update=uniform),
        "codebook": config.codebook.model_copy(update=random),
    }
    return design(config.model_copy(update=changes), data, _no_pilot)


def _no_pilot(*_: object) -> Mapping[str, object]:
    raise AssertionError("a sketch measures nothing")


def _check_models(run_plan: RunPlan) -> None:
    # else run.json would hold a configuration that no worker can build, and the run would then refuse the
    # corrected one
    arch = run_plan.config.model.arch
    for shard in range(run_plan.shards.blocks):
        if own_architecture(arch):
            check_network(arch, run_plan.model(shard, "meta"), run_plan.scheme.runs(run_plan.shards, shard))
        run_plan.objective(shard, "meta")
    if run_plan.config.init.branch:
        branch_plan(run_plan).objective(0, "meta")
    if architecture(arch).stack and not own_architecture(arch):
        _check_reads(run_plan)


def _check_reads(run_plan: RunPlan) -> None:
    """Refuse settings that another library takes, and with which its network fails on a batch of the data."""
    try:
        flops_of(run_plan, 0, 1)
    except Exception as error:  # whatever the library raises
        raise ConfigError(
            f"model.config: a network of these settings fails on a batch of the data ({type(error).__name__}: "
            f"{first_line(error)}): correct them by what the class's own documentation says"
        ) from None


def _continue(config: Config, run: Run) -> RunPlan:
    _refuse_another(run, config)
    # what does not determine the weights may change from one start to the next
    run_plan = replace(run.plan, config=config)
    if run_plan.data_hash:
        run_plan.data()  # told here in one line, not by every worker once it has its GPU
    return run_plan


def _refuse_another(run: Run, config: Config) -> None:
    manifest = run.manifest
    # data of the same content may lie elsewhere than where the run was started
    given = but_for_places(config, run.config) if manifest.data_hash else config
    if manifest.config_hash != given.content_hash():
        raise ConfigError(
            f"{run.store.url} is a run of another configuration: {difference(dict(manifest.config), given)}; "
            f"{_way_out(run, given)}"
        )


def _way_out(run: Run, given: Config) -> str:
    """What to do with a run of another configuration; one that differs in its length alone can go on."""
    now = with_lengths(given.training, lengths_of(run.config.training))
    if given.model_copy(update={"training": now}).content_hash() != run.manifest.config_hash:
        return "choose another name (name=...), give the configuration it was started with, or remove the directory"
    if run.manifest.extensions:
        return (
            f"it was extended: to train it on, dbtrain resume {run.store.url}, or give its lengths of now with the "
            f"configuration ({in_words(lengths_of(run.config.training))})"
        )
    return f"choose another name (name=...), or make it longer: dbtrain extend {run.store.url} training.steps=..."


def _manifest(run_plan: RunPlan, codebook_hash: str) -> Manifest:
    own = own_architecture(run_plan.config.model.arch)
    shards, split = run_plan.shards, run_plan.split
    plan = tuple(_row(shard, shards.layers(shard), run_plan.levels(shard)) for shard in range(shards.blocks))
    slices = tuple(_row(block, split.layers(block), run_plan.ranges.of(block)) for block in range(split.blocks))
    return Manifest(
        config=run_plan.config.model_dump(mode="json"),
        config_hash=run_plan.config.content_hash(),
        architecture_hash=run_plan.architecture_hash,
        plan=plan,
        noise=dict(run_plan.distribution),
        shape=dict(run_plan.shape),
        codebook_hash=codebook_hash,
        data_hash=run_plan.data_hash,
        versions=versions(),
        class_names=run_plan.class_names,
        data_notes=run_plan.data_notes,
        slices=slices if slices != plan else (),
        data_paths=run_plan.paths or resolved_paths(run_plan.config.data),
        init=run_plan.init,
        settled=dict(run_plan.settled),
        frozen_hash=frozen_hash_of(run_plan.frozen),
        model_hash=own.content_hash if own else "",
    )


def _row(block: int, layers: range, levels: tuple[float, float]) -> PlanRow:
    return PlanRow(block, (layers.start, layers.stop), (levels[0].hex(), levels[1].hex()))


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("deepspeed", "ray", "safetensors")
    return {
        "dbtrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in names},
    }
