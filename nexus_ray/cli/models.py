"""Verbs that use a finished overlay: compare routers, export, prove an export, serve, make keys, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_ray.cli.app import ConfigPath, Overrides, Quiet, Verbose, app, load, output, place
from nexus_ray.config import Config
from nexus_ray.console import setup_logging
from nexus_ray.errors import ConfigError


@app.command()
def drift(
    config: ConfigPath,
    overrides: Overrides = None,
    overlay: Annotated[
        str | None, typer.Option(metavar="DIR", help="overlay, path or URI; default: the run's trained one")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compare the routers of base and student on the calibration text (router_drift.json)."""
    from nexus_ray.evaluation.calibration_drift import drift_table, measure_drift
    from nexus_ray.layout import RunLayout
    from nexus_ray.run_lock import locked

    loaded = load(config, overrides, verbose, quiet, Config).config
    layout = RunLayout(loaded.run.directory)
    with locked(layout):
        output.print(drift_table(measure_drift(loaded, layout, place(overlay) if overlay else None)))


@app.command()
def export(
    config: ConfigPath,
    to: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="directory to write")],
    overrides: Overrides = None,
    overlay: Annotated[
        str | None, typer.Option(metavar="DIR", help="overlay to add, path or URI; default: the run's trained one")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="prove that the shared experts take part")] = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write base and overlay as one Hugging Face directory, which loads after `import nexus_ray`."""
    from nexus_ray.huggingface.export import describe, export
    from nexus_ray.layout import RunLayout

    loaded = load(config, overrides, verbose, quiet, Config).config
    chosen = place(overlay) if overlay else RunLayout(loaded.run.directory).overlay
    done = export(loaded.model.path, chosen, to, overwrite=overwrite, check=_merge_check if check else None)
    output.print(describe(done), highlight=False, soft_wrap=True)


@app.command(name="merge-check")
def merge_check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="an export")],
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Prove that an export computes with every shared tensor, and that these are the overlay's."""
    setup_logging(verbose=verbose, quiet=quiet)
    _merge_check(directory)


def _merge_check(directory: Path) -> None:
    from nexus_ray.huggingface.merge_check import describe, merge_check, summary

    report = merge_check(directory)
    output.print(describe(report))
    report.require_sound()
    output.print(summary(report), highlight=False, soft_wrap=True)


@app.command()
def serve(config: ConfigPath, overrides: Overrides = None, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Serve base and students: web page and OpenAI-compatible API (Ray Serve), until interrupted."""
    from serve.app import run_service

    run_service(load(config, overrides, verbose, quiet, Config).config)


@app.command(name="api-key")
def api_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="who it is for; stands in the access log")],
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="append the line to this file (serve.api_keys)")
    ] = None,
) -> None:
    """Make a key for the HTTP service: it is shown once, and only its SHA-256 is kept."""
    from nexus_ray.storage import write_text
    from serve.guard.keys import new_key

    key, line = new_key(name)
    if file is not None:
        try:
            before = file.read_text(encoding="utf-8") if file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file: cannot read {file}: {error}", "name a file of keys, or a new one") from error
        write_text(file, f"{before}{'' if before.endswith(chr(10)) or not before else chr(10)}{line}\n")
    output.print(f"key, give it to {name}: {key}", highlight=False, soft_wrap=True, markup=False)
    where = f"added to {file}" if file is not None else "line for the file that serve.api_keys names"
    output.print(f"{where}: {line}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def chat(
    config: ConfigPath,
    overrides: Overrides = None,
    which: Annotated[str, typer.Option("--with", help="who answers first: student, base or both")] = "student",
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Chat in the terminal; /base, /student and /both switch who answers."""
    from nexus_ray.chat import chat as start

    start(load(config, overrides, verbose, quiet, Config).config, which)
