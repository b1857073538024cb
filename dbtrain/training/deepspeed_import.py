"""DeepSpeed, imported without what it looks for and is never used here: workers wait for their imports."""

import importlib
import logging
import sys
from typing import Any


def _import_without(name: str, other: str) -> Any:
    """Import a module while another one, which it imports where it finds it, seems not to be installed."""
    hide = other not in sys.modules
    if hide:
        sys.modules[other] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        if hide:
            del sys.modules[other]


deepspeed = _import_without("deepspeed", "mlflow")
"""The module. Its autotuner, which nothing here calls, would import MLflow, for one to two seconds."""

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# None of DeepSpeed's own ops is used. To find out which could be, it runs compilers in every worker; and on a
# CPU it builds a shared-memory all-reduce, for a minute on every new host, without which gloo does as well.
vars(deepspeed.ops)["__compatible_ops__"] = {}
