"""What the page is made of."""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """The numbers of a figure."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | Markup, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of the page; `name` is unique and its anchor."""

    name: str
    title: str
    words: str
    figure: Markup | None = None
    tables: tuple[Table, ...] = ()
    open: bool = False
    """Whether the tables are shown at once."""


@dataclass(frozen=True)
class Missing:
    """What was not measured, and the command that measures it."""

    what: str
    command: str
