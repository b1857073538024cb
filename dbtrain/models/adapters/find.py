"""A look at a class that nobody has written a `Stack` for: where its layers may be, or why it cannot be cut.

Nothing is decided by what is found here: it is told, for a person to write a `Stack`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

SHIPPED: Mapping[str, str] = {
    "DiTTransformer2DModel": "hf_dit",
    "WanTransformer3DModel": "hf_wan",
    "LlamaForCausalLM": "hf_llama",
    "ViTForImageClassification": "hf_vit",
}
"""Classes that there is a row for."""
SKIPS = "layers of its second half read what layers of the first half gave (long skips), which would cross blocks"
INTERLEAVED = "its lists of layers take turns, and a block is a run of neighbours of one list"
FEEDING = "one of its lists of layers feeds the other at every depth, which would cross blocks"
CANNOT: Mapping[str, str] = {
    "HunyuanDiT2DModel": SKIPS,
    "LatteTransformer3DModel": INTERLEAVED,
    "WanVACETransformer3DModel": FEEDING,
    "ConsisIDTransformer3DModel": "layers at several depths read what a network beside them makes of a face",
}
"""Classes of diffusers, and why each cannot be cut."""


def told(kind: type[Any]) -> str:
    """What is to be said of a class of networks that is named as an architecture, as the end of a sentence.

    It is made on the meta device from its default settings, which costs no memory.
    """
    name = kind.__name__
    if name in SHIPPED:
        return f"there is a row for it: model.arch={SHIPPED[name]}"
    network = _made(kind)
    by_name = next((CANNOT[one.__name__] for one in kind.__mro__ if one.__name__ in CANNOT), "")
    why = by_name or ("" if network is None else unfit(network))
    if why:
        return f"it cannot be cut into blocks either, since {why}: take another network"
    found = [] if network is None else candidates(network)
    if not found:
        return "no list of layers was found in it that a Stack could name"
    return f"its layers may be {', or '.join(found)}: write a Stack that says which, and what runs before and after"


def _made(kind: type[Any]) -> nn.Module | None:
    """A network of the class by its default settings, without memory; None if it has none."""
    settings = getattr(kind, "config_class", None)
    try:
        with torch.device("meta"):
            network = kind(settings()) if settings else kind()
    except Exception:  # it wants arguments, or computes with its weights while it is made
        return None
    return network if isinstance(network, nn.Module) else None


def unfit(network: nn.Module) -> str:
    """Why a network cannot be cut, by what it is made of; '' if nothing speaks against it."""
    children = {name for name, _ in network.named_children()}
    if {"down_blocks", "up_blocks"} <= children:
        return SKIPS
    if any(name.rpartition(".")[2].startswith("skip_") for name, _ in network.named_modules()):
        return SKIPS
    return ""


def candidates(network: nn.Module) -> list[str]:
    """Lists that may be the layers, each with its name, length and class.

    By the library's own plan of a pipeline, else by the classes that it never splits, else the longest list
    of one class.
    """
    lists = {name: part for name, part in network.named_modules() if _is_of_one_class(part)}
    planned = _planned(network)
    by_plan = [name for name in lists if name.rpartition(".")[2] in planned]
    whole = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    by_class = [name for name, part in lists.items() if type(part[0]).__name__ in whole]
    longest = max((len(part) for part in lists.values()), default=0)
    by_length = [name for name, part in lists.items() if len(part) == longest]
    return list(_described(by_plan or by_class or by_length, lists))


def _planned(network: nn.Module) -> set[str]:
    plan = getattr(getattr(network, "config", None), "base_model_pp_plan", None)
    return set(plan) if isinstance(plan, Mapping) else set()


def _is_of_one_class(part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(layer) for layer in part}) == 1


def _described(names: Iterable[str], lists: Mapping[str, Any]) -> Iterable[str]:
    for name in names:
        yield f"{name} ({len(lists[name])} of {type(lists[name][0]).__name__})"
