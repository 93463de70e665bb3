"""The verb that looks after this node's cache of base models."""

from __future__ import annotations

from typing import Annotated

import typer

from nexus_ray.cli.app import app, output
from nexus_ray.console import setup_logging
from nexus_ray.errors import ConfigError

cache_app = typer.Typer(
    invoke_without_command=True,
    help="Show what remote base models this node keeps on its disk (NEXUS_RAY_CACHE), or remove them.",
)
app.add_typer(cache_app, name="cache")


@cache_app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_entries()


@cache_app.command(name="list")
def list_entries() -> None:
    """Show every entry: source, size, whether it is whole, when it was last used."""
    from nexus_ray.checkpoints.cache_contents import contents

    setup_logging()
    output.print(contents())


@cache_app.command()
def clear(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="entries to remove")] = None,
    until_free: Annotated[
        float | None,
        typer.Option(metavar="GB", min=0, help="remove entries, used least recently first, until so much is free"),
    ] = None,
) -> None:
    """Remove entries that no process of this node uses."""
    from nexus_ray.checkpoints import cache_contents

    setup_logging()
    if bool(names) == (until_free is not None):
        raise ConfigError("name entries, or say --until-free GB", "`nexus-ray cache` shows the entries")
    lines = cache_contents.clear(names) if names else cache_contents.make_room(until_free or 0)
    for line in lines:
        output.print(line, highlight=False, soft_wrap=True, markup=False)
