"""The file of an exported folder that loads it: which definitions it holds, and what stands below them."""

from collections.abc import Callable, Mapping
from typing import Any

from dbtrain import __version__
from dbtrain.evaluation.export.bundle import Definition, bundle
from dbtrain.method.interface import BlockModel
from dbtrain.models.registry import architecture
from dbtrain.run.plan import RunPlan

ROUTING, ABILITIES = "dbtrain.evaluation.export.routing", "dbtrain.evaluation.export.abilities"
ABLE: Mapping[str, Callable[[type[BlockModel]], bool]] = {
    "classify": lambda kind: kind.classifies,
    "sample": lambda kind: kind.samples == "image",
    "generate": lambda kind: kind.continues in ("cached", "uncached"),
    "unmask": lambda kind: kind.continues == "unmasking",
}
"""Functions of abilities.py, and whether an architecture has each."""

ADAPTED = """
class BlockOf{original}({task}):
    \"\"\"A {original} of {package}, cut into stem, layers and head.\"\"\"

    stack = {stack}


""".lstrip()
"""Class of a network of another library; the file also holds the stack and the task that it is made of."""
END = """
def load(folder: str | Path = Path(__file__).parent, verify: bool = False) -> RoutedBlocks:
    \"\"\"The model of a folder, by default of the one that this file lies in, on the CPU.

    With `verify` every file of weights is read once more before, and its SHA-256 compared with that in
    config.json; ValueError if one differs.
    \"\"\"
    from safetensors.torch import load_file

    return read_blocks(Path(folder), load_file, {network}, {noise}, {parametrisation}, verify)
""".lstrip()
TITLE = f"""
A model whose blocks were trained by themselves, each on its slice of the noise levels (DiffusionBlocks).

Written by dbtrain {__version__} (Apache-2.0), which it does not need; README.md says how to use it.
""".lstrip()


def abilities(run_plan: RunPlan) -> list[str]:
    """Functions beside `load` that the exported file has."""
    kind = architecture(run_plan.config.model.arch)
    return [name for name, fits in ABLE.items() if fits(kind)]


def modeling(run_plan: RunPlan) -> str:
    """The source of the file that loads the folder."""
    parts = _parts(run_plan)
    roots: list[Definition] = [(ROUTING, "read_blocks"), *((ABILITIES, name) for name in abilities(run_plan))]
    roots += [(kind.__module__, kind.__name__) for kind in parts.values()]
    names = {part: kind.__name__ for part, kind in parts.items()}
    network = parts["network"]
    if network.stack is None:
        return bundle(roots, TITLE, END.format(**names))
    # the class of the network is made when it is looked up and has no source: the file makes it from the
    # stack of the same name and the task
    task, original = network.__mro__[1], network.stack.original
    roots.append((task.__module__, task.__name__))
    of = {"original": original, "package": network.stack.package, "stack": network.__name__, "task": task.__name__}
    return bundle(roots, TITLE, ADAPTED.format(**of) + END.format(**names | {"network": f"BlockOf{original}"}))


def class_name(kind: type[BlockModel]) -> str:
    """Name of the class; for a network of another library, the name of its class there."""
    return str(kind.stack.original) if kind.stack else kind.__name__


def _parts(run_plan: RunPlan) -> dict[str, type[Any]]:
    return {
        "network": architecture(run_plan.config.model.arch),
        "noise": type(run_plan.noise()),
        "parametrisation": type(run_plan.parametrisation()),
    }
