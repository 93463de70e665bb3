"""What all verbs share: the application they register with, their common options, how a configuration is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nexus_ray.config import Resolved, SectionT, resolve_config
from nexus_ray.console import setup_logging
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Place, place_of

output = Console()

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, e.g. configs/demo.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help="values that replace those of the file, e.g. train.steps=320"
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show debug messages and tracebacks")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="show warnings and errors only")]
Strict = Annotated[
    bool, typer.Option("--strict", help="fail at the first row of text that cannot be read; same as data.strict=true")
]
Force = Annotated[bool, typer.Option("--force", help="do it again although it is complete")]

app = typer.Typer(
    name="nexus-ray",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Specialise a Mixture-of-Experts language model with one small trainable shared expert per layer.\n\n"
    "Start with [bold]nexus-ray run configs/demo.yaml[/bold]: it runs every stage on the embedded model. "
    "Every verb takes a configuration file and dotted overrides; [bold]nexus-ray config CONFIG[/bold] shows every "
    "field, its value and where the value comes from.",
)
targets_app = typer.Typer(no_args_is_help=True, help="Look into target sets.")
app.add_typer(targets_app, name="targets")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into model directories and overlays.")
app.add_typer(checkpoint_app, name="checkpoint")


def load(
    path: Path, overrides: list[str] | None, verbose: bool, quiet: bool, schema: type[SectionT], strict: bool = False
) -> Resolved[SectionT]:
    """Set up logging and read a configuration; `strict` sets data.strict."""
    setup_logging(verbose=verbose, quiet=quiet)
    return resolve_config(path, [*(overrides or []), *(["data.strict=true"] if strict else [])], schema)


def place(text: str) -> Place:
    """A path or URI of the command line.

    Raises:
        ConfigError: nothing installed here opens this kind of URI.
    """
    try:
        return place_of(text)
    except ValueError as error:
        raise ConfigError(str(error), "name a path or another URI") from error
