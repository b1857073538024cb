"""Which architectures there are: the rows of a table, and classes of the user's by their import path.

To add one to the package, write a `BlockModel`, which says what it can do, and one row here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dbtrain.method.lookup import look_up
from dbtrain.models.import_path import OwnClass, import_path, own_class

if TYPE_CHECKING:  # the configuration reads this table, and imports no torch before it needs a row
    from dbtrain.method.interface import BlockModel

ARCHITECTURES: dict[str, Any] = {
    "vit": "dbtrain.models.vit:ViT",
    "dit": "dbtrain.models.dit:DiT",
    "masked_lm": "dbtrain.models.masked_lm:MaskedLM",
    "recurrent": "dbtrain.models.recurrent:Recurrent",
    "ar_lm": "dbtrain.models.ar_lm:ARLM",
    "hf_vit": "dbtrain.models.adapters.rows:HfViT",
    "hf_dit": "dbtrain.models.adapters.rows:HfDiT",
    "hf_llama": "dbtrain.models.adapters.rows:HfLlama",
    "hf_wan": "dbtrain.models.adapters.rows:HfWan",
}
"""Architectures by the name that `model.arch` has: the class, or ``package.module:Class``, which is imported
when it is asked for.

A program of your own may add a row, but only its own process sees it: rows do not travel to Ray's workers,
which import the package anew. An import path as `model.arch` does travel (docs/own-network.md).
"""


def architecture(name: str) -> type[BlockModel]:
    """The class of an architecture: of a row, or the user's own.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported or used.
    """
    own = own_architecture(name)
    kind: type[BlockModel] = own.kind if own else look_up(ARCHITECTURES, "model.arch", name)
    return kind


def own_architecture(name: str) -> OwnClass | None:
    """A class of the user's, imported and checked; None if the name is that of a row, or of nothing.

    Raises:
        ConfigError: it cannot be imported, or is no architecture.
    """
    path = None if name in ARCHITECTURES else import_path(name)
    return checked(name, path) if path else None


@lru_cache
def checked(name: str, path: str) -> OwnClass:
    """Import a class and see whether it is an architecture; once in a process."""
    from dbtrain.models.adapters.adapted import adapted  # not above: they import torch
    from dbtrain.models.adapters.stack import is_stack
    from dbtrain.models.own_class import check_class

    own = own_class(name, path)
    if is_stack(own.kind):
        return replace(own, kind=adapted(own.kind))
    check_class(name, own.kind)
    return own
