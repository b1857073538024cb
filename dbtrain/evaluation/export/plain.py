"""Blocks of a network of another library, each as a folder of the original class, which its library loads.

A block is a whole network of as many layers as it has: stem, layers and head under their original names.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbtrain.errors import ConfigError
from dbtrain.evaluation.loading import load_model
from dbtrain.method.interface import BlockModel
from dbtrain.models.adapters.names import is_added, original_name
from dbtrain.models.adapters.stack import ADDED
from dbtrain.models.registry import architecture
from dbtrain.run.plan import RunPlan
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.safetensors_file import as_file
from dbtrain.shards.storage.store import Store
from dbtrain.telemetry.counting import Count, counted

FORMAT = "dbtrain plain export 1"
INPUTS = "inputs.safetensors"
"""File beside a network's own files: what was added in training to make an input of the original."""
MEANINGS: Mapping[str, str] = {
    "VpEps": "it is given z / sqrt(1 + sigma^2) of z = y + sigma eps, and predicts eps: the estimate is z - sigma eps",
    "FlowV": "it is given z / (1 + sigma) of z = y + sigma eps, and predicts v = eps - y: the estimate is (z - sigma v)"
    " / (1 + sigma)",
    "Velocity": "it is given z = (1 - t) y + t eps itself, and predicts v = eps - y: the estimate is z - t v",
}
"""What the networks are given and predict, by the class of the parametrisation."""


def check_plain(run_plan: RunPlan) -> None:
    """Refuse what the classes of other libraries would not compute as the blocks do.

    Raises:
        ConfigError: the network is not from another library, has parameters that the original does not have,
            or its blocks do not stand alone.
    """
    arch, method = run_plan.config.model.arch, run_plan.config.method
    stack = architecture(arch).stack
    if stack is None:
        raise ConfigError(f"model.arch={arch} is no network of another library: leave out --plain")
    if method != "diffusion_blocks":
        raise ConfigError(f"--plain is for method=diffusion_blocks, and this run is of method={method}: leave it out")
    if run_plan.config.model.loops:
        raise ConfigError(
            f"model.loops={run_plan.config.model.loops}: a block applies layers more than once, and "
            f"{stack.original} each of them once: leave out --plain"
        )
    if lost := lost_parameters(run_plan.model(0, "meta")):
        raise ConfigError(
            f"{stack.original} has no place for what was added to it, {', '.join(lost)}, and without that it "
            "would compute something else: leave out --plain"
        )


def lost_parameters(model: BlockModel) -> list[str]:
    """Parameters of a block that a folder of the original class would not have."""
    names = [name for name, _ in model.named_parameters() if is_added(name)]
    return [name for name in names if _input_name(name) not in model.stack.inputs]


def _input_name(name: str) -> str:
    return name.removeprefix(f"stem.{ADDED}.")


def folder_names(run_plan: RunPlan) -> list[str]:
    """Names of the blocks' folders, the noisiest first; those of the class's pipeline, if it has as many
    networks."""
    blocks = run_plan.split.blocks
    named: list[str] = list(architecture(run_plan.config.model.arch).stack.pipeline[:blocks])
    return named if len(named) == blocks else [f"block-{b:0{len(str(blocks - 1))}d}" for b in range(blocks)]


def write_plain(folder: Path, run_plan: RunPlan, merged: MergedDirectory, count: Count) -> type[Any]:
    """One folder for each block, by the `save_pretrained` of the class, which is returned.

    Raises:
        ConfigError: the class has no `save_pretrained`.
        ShardError: the model's files are damaged.
    """
    kind: type[Any] = nn.Module
    for block, name in counted(count, "blocks written", list(enumerate(folder_names(run_plan)))):
        model = load_model(run_plan, block, merged.block, merged.where)
        network: Any = as_original(model, run_plan.runs(block))
        if not hasattr(network, "save_pretrained"):
            raise ConfigError(f"{type(network).__name__} has no save_pretrained, which --plain writes with")
        network.save_pretrained(folder / name)
        inputs = {_input_name(key): tensor for key, tensor in model.state_dict().items() if is_added(key)}
        if inputs:
            Store(folder / name).write(INPUTS, as_file(inputs, {"kind": "export", "blocks": [block]}, INPUTS))
        kind = type(network)
    return kind


def as_original(model: BlockModel, layers: tuple[int, ...]) -> nn.Module:
    """The original class with a block's weights; its first layer is the block's first.

    Args:
        model: model of the block.
        layers: numbers, in the whole model, of the layers that the block applies, in order.
    """
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        network: nn.Module = model.cut_as.build(layers)  # type: ignore[operator, union-attr]
    place = {str(number): str(at) for at, number in enumerate(layers)}
    state = {}
    for name, tensor in model.state_dict().items():
        if is_added(name):
            continue
        group, number, *rest = name.split(".")
        own = ".".join([group, place[number], *rest]) if group == "layers" else name
        state[original_name(model.stack, own)] = tensor
    network.load_state_dict(state, strict=True)
    return network.eval()


def boundary(run_plan: RunPlan) -> dict[str, Any]:
    """Settings with which the class's pipeline chooses between two networks; empty for any other number of
    blocks, or for levels that are not those of a flow."""
    stack = architecture(run_plan.config.model.arch).stack
    if run_plan.split.blocks != 2 or len(stack.pipeline) < 2 or run_plan.level_name != "t":
        return {}
    ratio = boundary_ratio(run_plan.ranges.edges[1], stack.steps)
    return {"boundary_ratio": ratio, "num_train_timesteps": stack.steps}


def boundary_ratio(edge: float, steps: int) -> float:
    """The smallest ratio whose `timestep >= ratio * steps` asks the noisier network as `level > edge` does.

    This holds for every timestep that is a whole number or a float32, whose level is timestep / steps.
    PyTorch compares a tensor of such timesteps with a number in float32; in float64 the answer is the same.

    Args:
        edge: the level between the two slices, which belongs to the cleaner one.
        steps: `num_train_timesteps` of the scheduler.
    """
    first = torch.tensor(edge * steps, dtype=torch.float32)
    while float(first) / steps > edge:
        first = torch.nextafter(first, torch.tensor(-math.inf))
    while float(first) / steps <= edge:
        first = torch.nextafter(first, torch.tensor(math.inf))

    def divides(ratio: float) -> bool:
        return ratio > edge and float(torch.tensor(ratio * steps, dtype=torch.float32)) >= float(first)

    low, high = edge, math.nextafter(float(first) / steps, math.inf)
    while math.nextafter(low, math.inf) < high:
        middle = low + (high - low) / 2
        low, high = (low, middle) if divides(middle) else (middle, high)
    return high


def described_plainly(run_plan: RunPlan, described: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """The content of config.json beside the folders, which no class of a library takes for its own.

    Args:
        run_plan: plan of the model.
        described: what an export without --plain would write.
        kind: class of the folders.
    """
    blocks = [{**row, "file": name} for row, name in zip(described["blocks"], folder_names(run_plan), strict=True)]
    own = {"format": FORMAT, "architectures": ["Experts"], "model_type": "dbtrain_experts", "_class_name": "Experts"}
    network = {**described["network"], "class": kind.__name__}
    return {**described, **own, "network": network, "blocks": blocks, **boundary(run_plan)}


def plain_loading(run_plan: RunPlan, config: Mapping[str, Any], kind: type[Any]) -> str:
    """Parts of the card: how the folders are loaded, what the networks are given, and who answers."""
    stack, folders = architecture(run_plan.config.model.arch).stack, folder_names(run_plan)
    library, named = kind.__module__.split(".")[0], kind.__name__
    code = [f"from {library} import {named}", ""]
    code += [f'{name.replace("-", "_")} = {named}.from_pretrained("{name}")' for name in folders]
    scales = type(run_plan.parametrisation()).__name__
    meaning = MEANINGS.get(scales, f"what it is given and predicts is as `{scales}` of dbtrain has it")
    lines = [
        "## How to load it", "", f"It needs {library}, and not dbtrain. In this folder:", "",
        "```python", *code, "```", "",
        "Each folder holds a whole network, for its own slice of the levels: ask the one that owns the level. They are "
        "no parts of one chain.", "",
        f"- The network: {' '.join((inspect.getdoc(stack) or stack.original).split())}",
        f"- Of a level (`{config['level']}`), with y the data and eps normal noise: {meaning}.",
        f"- Its time: {inspect.getdoc(stack.time)}",
        *_inputs_text(run_plan),
        *_boundary_text(config, folders),
    ]  # fmt: skip
    return "\n".join(lines)


def _inputs_text(run_plan: RunPlan) -> list[str]:
    """What stands for a class or caption that the networks are told."""
    added = {_input_name(name) for name, _ in run_plan.model(0, "meta").named_parameters() if is_added(name)}
    inputs = architecture(run_plan.config.model.arch).stack.inputs
    lines = [f"- `{INPUTS}` beside each network, `{name}`: {what}." for name, what in inputs.items() if name in added]
    if "text" not in run_plan.shape:
        return lines
    length, width = run_plan.shape["text"]
    return [
        *lines,
        f"- A caption: embeddings ({length}, {width}) with zeros after its last token; in a pipeline of the library "
        f"`max_sequence_length={length}`. No caption: zeros everywhere, which a pipeline that guides is given as "
        "`negative_prompt_embeds`; of an empty text this model knows nothing.",
    ]


def _boundary_text(config: Mapping[str, Any], folders: list[str]) -> list[str]:
    if "boundary_ratio" not in config:
        return []
    return [
        f"- In a pipeline of the library: `{folders[0]}`, `{folders[1]}` and "
        f"`boundary_ratio={config['boundary_ratio']}`, which "
        f"divides the timesteps from {config['num_train_timesteps']} down to 0 as the table below divides the levels."
    ]
