"""What all sections of the configuration share."""

from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

TRUTH_VALUE = "truth_value"
"""Pydantic's type of the error that `explain` puts into words."""


class Section(BaseModel):
    """Base of all sections: immutable, and no key but the declared."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, content: Any) -> Any:
        """Refuse YAML's ``yes`` and ``true`` where numbers stand, since Python takes them for 1."""
        for key, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and not _takes_bool(field.annotation):
                raise PydanticCustomError(TRUTH_VALUE, "{key}", {"key": key, "value": str(value).lower()})
        return content

    @classmethod
    def members(cls) -> "list[type[Section]]":
        """The sections that may stand where this one is named: itself, unless it is the base of several."""
        return [cls]


def _takes_bool(annotation: Any) -> bool:
    """Whether a truth value may stand there, or a text, which is refused with a word on quotes."""
    return annotation in (bool, str, Any) or any(_takes_bool(part) for part in get_args(annotation))


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
