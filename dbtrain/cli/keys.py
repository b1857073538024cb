"""What a configuration may say: the reference of all keys, and the configurations that are shipped."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dbtrain.cli.command import app, reported
from dbtrain.telemetry.console import make_console
from dbtrain.telemetry.layout import say, show_table


@app.command()
@reported
def keys(
    section: Annotated[
        str | None, typer.Argument(help="Such as training or training.optimizer, or one key; by default all.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/keys.md.")] = False,
) -> None:
    """Show which keys a configuration may have: what each takes, its default, and what it means."""
    from dbtrain.config.reference import groups
    from dbtrain.config.reference import markdown as document

    if markdown:
        print(document(), end="")
        return
    console = make_console()
    for group in groups(section):
        say(console, f"\n{group.title}: {group.about}")
        table = Table("key", "takes", "default", "")
        for key in group.keys:
            table.add_row(*(escape(text) for text in (key.name, key.kind, key.default, key.about)))
        if group.keys:
            show_table(console, table)


@app.command()
@reported
def configs(
    to: Annotated[Path | None, typer.Option("--to", help="Folder to copy them into, to change them there.")] = None,
) -> None:
    """Show the configurations that are shipped; each can be given by its name where a file is wanted."""
    from dbtrain.config.shipped import about, copy_to, shipped

    console = make_console()
    if to is not None:
        say(console, f"{len(copy_to(to))} configurations are in {to}/")
        return
    table = Table("name", "what it trains")
    for name, path in shipped().items():
        table.add_row(name, escape(about(path)))
    show_table(console, table)
