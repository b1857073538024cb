"""What all sections of the configuration share."""

from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: immutable, and no key but the declared."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def members(cls) -> "list[type[Section]]":
        """The sections that may stand where this one is named: itself, unless it is the base of several."""
        return [cls]


Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


Exception_ = TypeVar("Exception_", bound=Section)
ByBlock = Annotated[dict[int, Exception_], BeforeValidator(_none_is_empty)]
"""Exceptions for single blocks; null for none, which takes back those of a file."""


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a key's type names, such as all sources of data; none for a key of plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation.members()
    return [section for part in get_args(annotation) for section in sections_of(part)]
