"""A network of another library, made anew as stem, layers and head, which are modules of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.adapters.modulation import Told, modulate
from dbtrain.models.adapters.names import our_name
from dbtrain.models.adapters.stack import ADDED, Stack


class Part(nn.Module):
    """A stem or head; what runs in it runs as its forward pass, by which ZeRO 3 gathers its parameters."""

    def forward(self, act: Callable[..., Any], *inputs: Any) -> Any:
        """What `act` gives for these inputs."""
        return act(*inputs)


def cut(stack: Stack, layers: Sequence[int], level_dim: int) -> tuple[nn.Module, nn.ModuleDict, nn.Module]:
    """Stem, layers by their numbers in the whole model, and head.

    Only these layers are made. Stem and head have the original's modules under their original names.

    Args:
        stack: stack of the network.
        layers: numbers of those that are held.
        level_dim: width of the condition that layers are told the level by.
    """
    network = stack.build(layers)
    keep_in_float32(network)
    parts = {"stem": Part(), "head": Part()}
    _share_out(network, "", stack, parts)
    held = list(network.get_submodule(stack.layers).children())
    for layer in held:
        modulate(layer, stack.modulated, stack.width, level_dim)
    if additions := stack.additions():
        parts["stem"].add_module(ADDED, additions)
    return parts["stem"], nn.ModuleDict(dict(zip(map(str, layers), held, strict=True))), parts["head"]


def _share_out(module: nn.Module, before: str, stack: Stack, parts: Mapping[str, nn.Module]) -> None:
    """Make every module that holds no other part a child of the part that it is of, and so each tensor.

    Args:
        module: module of the original.
        before: its name and a dot, '' for the original itself.
        stack: stack of the network.
        parts: stem and head, to be filled.
    """
    for name, child in module.named_children():
        full = before + name
        if any(other.startswith(f"{full}.") for other in (stack.layers, *stack.head)):
            _share_out(child, f"{full}.", stack, parts)
        elif full != stack.layers:
            _place(parts, stack, full).register_module(name, child)
    for name, parameter in module.named_parameters(recurse=False):
        _place(parts, stack, before + name).register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        _place(parts, stack, before + name).register_buffer(name, buffer, persistent=False)


def _place(parts: Mapping[str, nn.Module], stack: Stack, name: str) -> nn.Module:
    """What holds a module or tensor of the original in its part; empty modules stand for those above it."""
    here = parts[our_name(type(stack), name).split(".", 1)[0]]
    for step in name.split(".")[:-1]:
        if not hasattr(here, step):
            here.register_module(step, nn.Module())
        here = here.get_submodule(step)
    return here


def keep_in_float32(network: nn.Module) -> None:
    """Compute those modules in float32, whatever the precision around them, that the original names so."""
    names = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in names:
            module.forward = _InFloat32(module.forward)


class _InFloat32:
    """A module's forward pass outside of autocast, of inputs in float32."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        first = next(value for value in inputs if isinstance(value, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return self.forward(*(v.float() if _is_float(v) else v for v in inputs), **keywords)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def told(condition: Tensor | None) -> Told:
    """Keyword arguments of a layer that is told the level by its norms; none of one that knows a time."""
    return {} if condition is None else {"condition": condition}
