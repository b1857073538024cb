"""Which architectures there are. To add one, write a `BlockModel`,
which says what it can do, and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbtrain.method.lookup import look_up

if TYPE_CHECKING:  # the configuration reads this table, and imports no torch before it needs a row
    from dbtrain.method.interface import BlockModel

ARCHITECTURES: dict[str, Any] = {
    "vit": "dbtrain.models.vit:ViT",
    "dit": "dbtrain.models.dit:DiT",
    "masked_lm": "dbtrain.models.masked_lm:MaskedLM",
    "recurrent": "dbtrain.models.recurrent:Recurrent",
    "ar_lm": "dbtrain.models.ar_lm:ARLM",
}
"""By the name that `model.arch` has: the class, or ``package.module:Class``, imported when it is asked for.

A program of your own may add a row, but only its own process sees it: rows do not travel to Ray's workers,
which import the package anew. What `dbtrain train` trains needs its class and its row in the package.
"""


def architecture(name: str) -> type[BlockModel]:
    """The class of an architecture.

    Raises:
        ConfigError: there is none of that name.
    """
    kind: type[BlockModel] = look_up(ARCHITECTURES, "model.arch", name)
    return kind
