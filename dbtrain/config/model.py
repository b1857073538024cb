"""Section `model`: its keys are the keyword arguments of the architecture's class,
with their bounds and defaults."""

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_type_hints

from pydantic import BeforeValidator, Field, SerializeAsAny, TypeAdapter, create_model
from pydantic.errors import PydanticUserError

from dbtrain.config.section import Count, Section
from dbtrain.errors import ConfigError, first_line
from dbtrain.models.bounds import FromRun
from dbtrain.models.registry import ARCHITECTURES, architecture, own_architecture

GIVEN = frozenset({"self", "codebook", "noise", "parametrisation", "layers"})
"""Arguments that the run gives, besides what the class takes of the data and what it marks as `FromRun`."""


MOST_LOOPS = 1000
"""The published models loop 4 to 64 times; a count of millions is a slip, and would fill the memory."""
Loop = Annotated[Count, Field(le=MOST_LOOPS)]


class ModelConfig(Section):
    """What every architecture has; its own keys are in the class that :func:`model_section` makes."""

    noise_defaults: ClassVar[Mapping[str, Any]] = {}
    """What `noise` is where the user says nothing: the class's own."""

    arch: str
    """Row of the table in models/registry.py, or the import path of a class of your own."""
    depth: Count
    """Layers of the whole model."""
    loops: tuple[Loop, ...] | None = None
    """How often each layer of the whole model is applied, one count a layer; neighbours of a block with the
    same count are applied as one group, so that 1,2,2,1 is 0,1,2,1,2,3. By default every layer once."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the architecture's class; `predict` is told in which order to apply layers."""
        return self.model_dump(exclude={"arch", "loops"})

    def content(self) -> dict[str, Any]:
        """What the weights mean, as JSON; loops only if there are any, so that runs of before go on."""
        return self.model_dump(mode="json", exclude={"loops"} if self.loops is None else None)

    @classmethod
    def members(cls) -> list[type[Section]]:
        """The sections of all architectures; of one, itself."""
        return [model_section(arch) for arch in ARCHITECTURES] if cls is ModelConfig else [cls]


def model_section(arch: str) -> type[ModelConfig]:
    """The section of an architecture.

    Raises:
        ConfigError: there is none of that name, or an argument of its class has a type that no value can be
            checked against.
    """
    return _section(arch, architecture(arch))


@lru_cache
def _section(arch: str, kind: type[Any]) -> type[ModelConfig]:
    hints = get_type_hints(kind.__init__, include_extras=True)
    told, summary = argument_docs(kind), (inspect.getdoc(kind) or "").split("\n", 1)[0]
    fields: dict[str, Any] = {"arch": (Literal[arch], Field(arch, description=summary))}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in (*GIVEN, *kind.takes, *kind.may_take) or _is_from_run(hints[name]):
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        # a layer less than one is no network, whatever the class says of its own
        kind_of_value = Count if name == "depth" and hints[name] is int else hints[name]
        fields[name] = (kind_of_value, Field(default, description=told.get(name)))
    try:
        section = create_model(f"{kind.__name__}Config", __base__=ModelConfig, __doc__=summary, **fields)
    except (PydanticUserError, NameError) as error:
        raise ConfigError(
            f"model.arch={arch}: the arguments of its constructor cannot be keys of a configuration: "
            f"{first_line(error)}; give them types such as int, float, bool, str or tuple[int, ...]"
        ) from None
    section.noise_defaults = kind.noise_defaults
    return section


def _is_from_run(hint: Any) -> bool:
    return any(isinstance(mark, FromRun) for mark in getattr(hint, "__metadata__", ()))


def argument_docs(kind: type[Any]) -> dict[str, str]:
    """What the docstring of a class says of its arguments:
    ``name: text`` under ``Args:``, and lines indented below."""
    _, _, section = (inspect.getdoc(kind) or "").partition("\nArgs:\n")
    told: dict[str, str] = {}
    names: list[str] = []
    for line in section.split("\n\n", 1)[0].splitlines():
        found = re.match(r"    ([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", line)
        if found:
            names = found[1].split(", ")
        text = found[2] if found else line.strip()
        told |= {name: f"{told[name]} {text}" if name in told and not found else text for name in names}
    return {name: text[:1].upper() + text[1:] for name, text in told.items()}


def _of_its_architecture(value: Any) -> Any:
    if isinstance(value, ModelConfig):
        return value
    return _union((*ModelConfig.members(), *_own_section(value))).validate_python(_completed(value))


def _completed(value: Any) -> Any:
    """The section with what its architecture reads from elsewhere; anything that is no section as it is."""
    arch = value.get("arch") if isinstance(value, Mapping) else None
    if not isinstance(arch, str) or not (arch in ARCHITECTURES or own_architecture(arch)):
        return value
    try:
        return dict(architecture(arch).completed(value))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _own_section(value: Any) -> tuple[type[ModelConfig], ...]:
    """The section of a class of the user's, where the value names one."""
    arch = value.get("arch") if isinstance(value, Mapping) else None
    try:
        return (model_section(arch),) if isinstance(arch, str) and own_architecture(arch) else ()
    except ConfigError as error:
        raise ValueError(str(error)) from None


@lru_cache
def _union(sections: tuple[type[Section], ...]) -> TypeAdapter[Any]:
    """Chooses by `arch`, and puts it into the place of an error as for every such section."""
    members: Any = Annotated[Union[sections], Field(discriminator="arch")]  # noqa: UP007
    return TypeAdapter(members)


AnyModel = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_of_its_architecture)]
"""The section of whichever architecture it names."""
