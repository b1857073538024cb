"""dbtrain: train a deep residual network as isolated blocks (DiffusionBlocks, arXiv 2506.14202).

The functions below are those of :mod:`dbtrain.api`, which imports PyTorch and Ray; each is imported when it
is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbtrain.api import (
        Config,
        Evaluation,
        MergedNetwork,
        Run,
        evaluate,
        live_view,
        load_config,
        load_merged,
        merge,
        predict,
        prepare,
        run_config,
        status,
        train,
    )

__version__ = "0.2.0"

__all__ = [
    "Config",
    "Evaluation",
    "MergedNetwork",
    "Run",
    "evaluate",
    "live_view",
    "load_config",
    "load_merged",
    "merge",
    "predict",
    "prepare",
    "run_config",
    "status",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name, from :mod:`dbtrain.api`."""
    if name not in __all__:
        raise AttributeError(f"module 'dbtrain' has no attribute {name!r}")
    return getattr(import_module("dbtrain.api"), name)


def __dir__() -> list[str]:
    """What there is, also what is not imported yet."""
    return [*globals(), *__all__]
