"""What all sections of the configuration share."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: immutable, and no key but the declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

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
