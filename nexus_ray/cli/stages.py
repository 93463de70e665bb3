"""Verbs that run the pipeline or one of its stages."""

from __future__ import annotations

from typing import Annotated

import typer

from nexus_ray.cli.app import ConfigPath, Force, Overrides, Quiet, Strict, Verbose, app, load, output
from nexus_ray.config import STAGES, Config, PretrainRun


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="do this stage and all later ones again")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="stop after this stage")] = None,
    strict: Strict = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline: collect, select, convert, precompute, train, evaluate.

    Stages whose artefacts are complete are skipped; an interrupted stage continues.
    """
    from nexus_ray.cli.done import artefacts_of, say_done
    from nexus_ray.evaluation.report import console_table
    from nexus_ray.layout import RunLayout
    from nexus_ray.pipeline import run_pipeline
    from nexus_ray.storage import read_json

    loaded = load(config, overrides, verbose, quiet, Config, strict).config
    run_pipeline(loaded, first, last)
    layout = RunLayout(loaded.run.directory)
    if last in (None, STAGES[-1]):
        output.print(console_table(read_json(layout.report, what="report", hint="run `nexus-ray evaluate CONFIG`")))
    say_done("run", artefacts_of(layout, last or STAGES[-1]))


def _run_stage(config: Config, name: str, force: bool) -> None:
    from nexus_ray.cli.done import artefacts_of, say_done
    from nexus_ray.layout import RunLayout
    from nexus_ray.pipeline import run_single_stage

    run_single_stage(config, name, force=force)
    say_done(name, artefacts_of(RunLayout(config.run.directory), name))


def _stage_command(name: str, text: str) -> None:
    """Register the verb of one stage."""

    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        strict: Strict = False,
        force: Force = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        _run_stage(load(config, overrides, verbose, quiet, Config, strict).config, name, force)

    command.__doc__ = text
    app.command(name=name)(command)


_stage_command("collect", "Collect router statistics of the base on text chosen for it (router_stats.safetensors).")
_stage_command(
    "select", "Rank the experts of each layer by the router statistics (selection.md, selection.json, plots/)."
)


@app.command()
def convert(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be read and written, and write nothing")
    ] = False,
    strict: Strict = False,
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Initialise one shared expert a layer from the selected experts (overlay-initial/)."""
    loaded = load(config, overrides, verbose, quiet, Config, strict).config
    if dry_run:
        from nexus_ray.conversion.plan import plan_conversion, plan_table
        from nexus_ray.layout import RunLayout

        output.print(plan_table(plan_conversion(loaded, RunLayout(loaded.run.directory))))
    else:
        _run_stage(loaded, "convert", force)


_stage_command("precompute", "Pack the training text and store the teacher's targets (targets/).")
_stage_command("train", "Train the shared experts by distillation (overlay/, metrics.jsonl).")
_stage_command("evaluate", "Compare base and student on held-out text (report.md, report.json, plots/).")


@app.command()
def pretrain(
    config: ConfigPath,
    overrides: Overrides = None,
    strict: Strict = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a small MoE from scratch on text and export it with MXFP4 experts (see configs/pretrain-tiny.yaml)."""
    from nexus_ray.cli.done import say_done
    from nexus_ray.pretraining.run import pretrain as start

    say_done("pretrain", {"model": start(load(config, overrides, verbose, quiet, PretrainRun, strict).config)})
