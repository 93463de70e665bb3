"""The command line: verbs only. Each parses, calls one function and prints.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted (the same command continues).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from nexus_ray import __version__
from nexus_ray.config import STAGES, Config, PretrainRun, Resolved, SectionT, describe_field, flatten, resolve_config
from nexus_ray.console import setup_logging
from nexus_ray.errors import NexusError

logger = logging.getLogger(__name__)
output = Console()
_INTERRUPTED = 130  # what typer returns after Ctrl-C, and shells expect

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


def _load(
    path: Path, overrides: list[str] | None, verbose: bool, quiet: bool, schema: type[SectionT], strict: bool = False
) -> Resolved[SectionT]:
    setup_logging(verbose=verbose, quiet=quiet)
    return resolve_config(path, [*(overrides or []), *(["data.strict=true"] if strict else [])], schema)


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
    from nexus_ray.evaluation.report import console_table
    from nexus_ray.layout import RunLayout
    from nexus_ray.pipeline import run_pipeline
    from nexus_ray.storage import read_json

    loaded = _load(config, overrides, verbose, quiet, Config, strict).config
    run_pipeline(loaded, first, last)
    layout = RunLayout(loaded.run.directory)
    if last in (None, STAGES[-1]):
        output.print(console_table(read_json(layout.report, what="report", hint="run `nexus-ray evaluate CONFIG`")))
        output.print(f"report: {layout.report.with_suffix('.md')}", soft_wrap=True)


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
        from nexus_ray.pipeline import run_single_stage

        run_single_stage(_load(config, overrides, verbose, quiet, Config, strict).config, name, force=force)

    command.__doc__ = text
    app.command(name=name)(command)


_stage_command("collect", "Collect router statistics of the base on the training text (router_stats.safetensors).")
_stage_command("select", "Rank the experts of each layer from the router statistics (selection.json, plots).")


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
    loaded = _load(config, overrides, verbose, quiet, Config, strict).config
    if dry_run:
        from nexus_ray.conversion.plan import plan_conversion, plan_table
        from nexus_ray.layout import RunLayout

        output.print(plan_table(plan_conversion(loaded, RunLayout(loaded.run.directory))))
    else:
        from nexus_ray.pipeline import run_single_stage

        run_single_stage(loaded, "convert", force=force)


_stage_command("precompute", "Pack the training text and store the teacher's targets (targets/).")
_stage_command("train", "Train the shared experts by distillation (overlay/, metrics.jsonl).")
_stage_command("evaluate", "Compare base and student on held-out text (report.md, report.json, plots/).")


@app.command()
def drift(
    config: ConfigPath,
    overrides: Overrides = None,
    overlay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="overlay of the student; default: the run's trained one")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compare the routers of base and student on the calibration text (router_drift.json)."""
    from nexus_ray.evaluation.calibration_drift import drift_table, measure_drift
    from nexus_ray.layout import RunLayout
    from nexus_ray.pipeline import Run, locked

    loaded = _load(config, overrides, verbose, quiet, Config).config
    with locked(Run(loaded)):
        output.print(drift_table(measure_drift(loaded, RunLayout(loaded.run.directory), overlay)))


@app.command()
def export(
    config: ConfigPath,
    to: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="directory to write")],
    overrides: Overrides = None,
    overlay: Annotated[
        Path | None, typer.Option(metavar="DIR", help="overlay to add; default: the run's trained one")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="prove that the shared experts take part")] = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write base and overlay as one Hugging Face directory, which loads after `import nexus_ray`."""
    from nexus_ray.huggingface.export import describe, export
    from nexus_ray.layout import RunLayout

    loaded = _load(config, overrides, verbose, quiet, Config).config
    chosen = overlay or RunLayout(loaded.run.directory).overlay
    done = export(Path(loaded.model.path), chosen, to, overwrite=overwrite, check=_merge_check if check else None)
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
    """Serve base and student over an OpenAI-compatible HTTP API (Ray Serve) until interrupted."""
    from serve.app import run_service

    run_service(_load(config, overrides, verbose, quiet, Config).config)


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

    start(_load(config, overrides, verbose, quiet, Config).config, which)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, sizes in bytes")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show what a run will need beside what this machine has: memory by part, storage, tokens.

    Computed from config.json, file headers and file sizes; no weights are read and Ray is not started.
    """
    from nexus_ray.planning.plan import make_plan
    from nexus_ray.planning.tables import show_plan

    made = make_plan(_load(config, overrides, verbose, quiet, Config).config)
    if as_json:
        output.print_json(data=made.as_dict())
    else:
        output.print(show_plan(made))


@app.command(name="config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show every field of the resolved configuration, where its value comes from and what it means."""
    resolved = _load(config, overrides, False, False, Config)
    values = flatten(resolved.config)
    width = max(len(name) for name in values)
    for name, value in values.items():
        description = describe_field(Config, name)
        output.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
        note = f"({resolved.origins[name]}) {description}".rstrip()
        output.print(f"{'':<{width}}  {note}", style="dim", markup=False, highlight=False, soft_wrap=True)


@targets_app.command(name="inspect")
def inspect_targets(
    path: Annotated[Path, typer.Argument(help="directory of a target set, e.g. runs/demo/targets")],
    verify: Annotated[bool, typer.Option("--verify", help="compare every file with its checksum")] = False,
) -> None:
    """Show what a target set holds."""
    from nexus_ray.targets.inspect import describe

    setup_logging()
    output.print(describe(path, verify=verify))


@checkpoint_app.command(name="inspect")
def inspect_checkpoint(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="model directory or overlay; local path or URI")],
    sha256: Annotated[bool, typer.Option("--sha256", help="hash every byte of every file")] = False,
) -> None:
    """Check every tensor header of a model or an overlay and show what it holds."""
    from nexus_ray.checkpoints.inspect import describe, identity

    setup_logging()
    output.print(describe(directory))
    for line in identity(directory, sha256=sha256):
        output.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories")],
    to: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write")] = Path("runs.png"),
) -> None:
    """Draw the training curves of one run or several into one figure."""
    from nexus_ray.plots import compare_runs
    from nexus_ray.training.metrics import read_runs

    setup_logging()
    compare_runs(read_runs(runs), to)
    output.print(f"written: {to}", soft_wrap=True)


@app.command()
def pretrain(
    config: ConfigPath,
    overrides: Overrides = None,
    strict: Strict = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a small MoE from scratch on text and export it with MXFP4 experts (see configs/pretrain-tiny.yaml)."""
    from nexus_ray.pretraining.run import pretrain as start

    path = start(_load(config, overrides, verbose, quiet, PretrainRun, strict).config)
    output.print(f"model: {path}", soft_wrap=True)


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


def run_command(arguments: list[str]) -> int:
    """Run one command line; return its exit code."""
    verbose = "--verbose" in arguments or "-v" in arguments
    errors = Console(stderr=True)
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
    if code == _INTERRUPTED:
        errors.print("interrupted; the same command continues where this one stopped", soft_wrap=True)
    return code if isinstance(code, int) else 0
