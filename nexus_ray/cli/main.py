"""The entry point: runs a command line, shows errors, gives the exit code."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from nexus_ray import __version__
from nexus_ray.cli.app import app, output
from nexus_ray.cluster import stop_as_on_ctrl_c
from nexus_ray.errors import NexusError

# Importing a module registers its verbs; --help lists them in this order.
# isort: split
from nexus_ray.cli import stages  # noqa: F401

# isort: split
from nexus_ray.cli import models  # noqa: F401

# isort: split
from nexus_ray.cli import looking  # noqa: F401

# isort: split
from nexus_ray.cli import cache  # noqa: F401

logger = logging.getLogger(__name__)
_INTERRUPTED = 130  # what typer returns after Ctrl-C, and shells expect


def _print_version(value: bool) -> None:
    if value:
        output.print(f"nexus-ray {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    sys.exit(run_command(list(sys.argv[1:] if arguments is None else arguments)))


def _show_usage_error(error: typer.TyperException) -> None:
    """Let typer print the usage line with the message where it has one."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
    else:
        Console(stderr=True).print(f"error: {escape(str(error))}", soft_wrap=True)


def _again(arguments: Sequence[str]) -> str:
    """The command that goes on with what an interrupted one began."""
    afresh = [name for name in ("--force", "--from") if any(word.split("=")[0] == name for word in arguments)]
    return f"the same command without {afresh[0]}" if afresh else "the same command"


def run_command(arguments: list[str]) -> int:
    """Run one command line; return its exit code."""
    verbose = "--verbose" in arguments or "-v" in arguments
    errors = Console(stderr=True)
    stop_as_on_ctrl_c()
    try:
        code = app(arguments, standalone_mode=False)
    except NexusError as error:
        if verbose:
            logger.exception("failed")
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return error.exit_code
    except typer.TyperException as error:
        _show_usage_error(error)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except SystemExit as error:  # what Ray makes of SIGTERM
        code = _INTERRUPTED if error.code == signal.SIGTERM else error.code
    if code == _INTERRUPTED:
        errors.print(f"interrupted; {_again(arguments)} continues where this one stopped", soft_wrap=True)
    return code if isinstance(code, int) else 0
