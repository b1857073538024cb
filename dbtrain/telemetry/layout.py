"""Prose and tables that fit the terminal and break no word."""

import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prose: on a terminal it wraps between words and cuts no path in two;
    elsewhere a message is one line."""
    if console.is_terminal:
        lines = (
            textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )
        text = "\n".join(lines)
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def show_table(console: Console, table: Table) -> None:
    """A table; where its longest words do not fit side by side,
    each row as a line of ``name value`` pairs."""
    headers = [_plain(column.header) for column in table.columns]
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    words = [" ".join([head, *cells]).split() for head, cells in zip(headers, columns, strict=True)]
    longest = [max(map(len, of_column), default=0) for of_column in words]
    # each column has a space on both sides and a line
    if sum(width + 3 for width in longest) + 1 <= console.width:
        for column, width in zip(table.columns, longest, strict=True):
            column.min_width = width
        console.print(table)
        return
    if table.title:
        say(console, _plain(table.title))
    for row in zip(*columns, strict=True):
        first, *rest = (f"{head} {cell}".strip() for head, cell in zip(headers, row, strict=True) if cell)
        say(console, f"{first}: {', '.join(rest)}" if rest else first)


def _plain(cell: Any) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
