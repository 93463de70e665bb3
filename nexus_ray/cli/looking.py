"""Verbs that only look: at a plan, a configuration, an artefact, the curves of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_ray.cli.app import (
    ConfigPath,
    Overrides,
    Quiet,
    Verbose,
    app,
    checkpoint_app,
    load,
    output,
    place,
    targets_app,
)
from nexus_ray.config import Config, describe_field, flatten
from nexus_ray.console import setup_logging
from nexus_ray.storage import exists, is_remote, local_directory


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, sizes in bytes")] = False,
    to: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw schedules: .png or .svg")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show what a run will need beside what this machine has (memory by part, storage, tokens), and its schedules.

    Computed from config.json, file headers and file sizes; no weights are read and Ray is not started.
    """
    from nexus_ray.planning.plan import make_plan
    from nexus_ray.planning.tables import show_plan

    made = make_plan(load(config, overrides, verbose, quiet, Config).config)
    if to is not None:
        from nexus_ray.plots import plot_schedules

        plot_schedules(made.schedules, to)
    if as_json:
        output.print_json(data=made.as_dict())
    else:
        output.print(show_plan(made))


@app.command(name="config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show every field of the resolved configuration, where its value comes from and what it means."""
    resolved = load(config, overrides, False, False, Config)
    values = flatten(resolved.config)
    width = max(len(name) for name in values)
    for name, value in values.items():
        description = describe_field(Config, name)
        output.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
        note = f"({resolved.origins[name]}) {description}".rstrip()
        output.print(f"{'':<{width}}  {note}", style="dim", markup=False, highlight=False, soft_wrap=True)


@targets_app.command(name="inspect")
def inspect_targets(
    path: Annotated[str, typer.Argument(help="target set, e.g. runs/demo/targets; a directory or a URI")],
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="compare every byte with its checksums")] = True,
    sequence: Annotated[int | None, typer.Option(metavar="N", help="decode this one, from 0")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="tokenizer, where it has moved")] = None,
) -> None:
    """Show what a target set holds, check every checksum and decode one sequence."""
    from nexus_ray.targets.inspection.inspect_text import inspect

    setup_logging()
    for part in inspect(path, verify=verify, sequence=sequence, tokenizer=tokenizer):
        if isinstance(part, str):
            output.print(part, highlight=False, markup=False, soft_wrap=True)
        else:
            output.print(part)


@checkpoint_app.command(name="inspect")
def inspect_checkpoint(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="model directory or overlay; local path or URI")],
    sha256: Annotated[bool, typer.Option("--sha256", help="hash every byte of every file")] = False,
) -> None:
    """Check every tensor header of a model or an overlay and show what it holds."""
    from nexus_ray.checkpoints.inspect import describe, identity

    setup_logging()
    named = place(directory)
    found = local_directory(named) if is_remote(named) and exists(named) else directory
    output.print(describe(found))
    for line in identity(found, sha256=sha256):
        output.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run directories, paths or URIs")],
    to: Annotated[Path, typer.Option("--output", "-o", help="figure to write, .png or .svg")] = Path("runs.png"),
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="draw this one, named as in TensorBoard, e.g. validation/loss; repeatable"),
    ] = None,
    smoothing: Annotated[
        float, typer.Option(min=0, max=1, help="width of the moving average, as a share of the run; 0: none")
    ] = 0.05,
) -> None:
    """Draw everything about one run, or compare several runs on the same axes, with marks where something happened."""
    from nexus_ray.plots import compare_runs, plot_training
    from nexus_ray.training.watching.metrics import read_runs

    setup_logging()
    records = read_runs([place(run) for run in runs])
    if len(records) == 1 and not metric:
        plot_training(next(iter(records.values())), to, smoothing)
    else:
        compare_runs(records, to, metrics=metric or (), smoothing=smoothing)
    output.print(f"written: {to}", soft_wrap=True)
