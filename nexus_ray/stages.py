"""The stages of a run: what each does, reads, makes, and which settings decide its result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nexus_ray.config import Config, Section
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place
from nexus_ray.training.local import local_only

if TYPE_CHECKING:
    from nexus_ray.pipeline import Run


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as on the command line.
        run: does the work; gets the run and the stage's recipe.
        after: stages whose artefacts it reads.
        sections: configuration that decides its result.
        outputs: files and directories that it makes.
        names: of the files in a directory that it makes, where a manifest of its own says so.
        state: what it keeps for continuing; removed when the recipe has changed.
        reused: artefacts whose parts it takes up again, whatever the recipe; removed when it is told to start over.
        unfinished: what of its state is too dear to be removed because a setting has changed, in words; "" if nothing.
        finished: what it makes, in words, where that is too dear to be replaced for such a reason; else "".
        ahead: refuses what settings and packages alone rule out, before earlier stages take their time.
        check: refuses what cannot be done with what those have made, before anything is removed.
    """

    name: str
    run: Callable[[Run, str], None]
    after: tuple[str, ...]
    sections: Callable[[Run], dict[str, Any]]
    outputs: Callable[[RunLayout], tuple[Place, ...]]
    names: Callable[[Place], Collection[str]] = lambda place: ()
    state: Callable[[RunLayout], tuple[Place, ...]] = lambda layout: ()
    reused: Callable[[RunLayout], tuple[Place, ...]] = lambda layout: ()
    unfinished: Callable[[RunLayout], str] = lambda layout: ""
    finished: str = ""
    ahead: Callable[[Config], None] = lambda config: None
    check: Callable[[Run], None] = lambda run: None


def _dump(section: Section, *drop: str) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=set(drop))


def _data(run: Run, sources: Collection[str] | None = None) -> dict[str, Any]:
    """The training text, of all sources unless they are named."""
    data = run.config.data
    text = [entry for entry in run.train_text if sources is None or entry[0] in sources]
    return {"sequence_length": data.sequence_length, "shard_bytes": data.shard_bytes, "text": text}


def _predicted(run: Run, sources: Collection[str]) -> dict[str, Any]:
    """Which tokens of some sources are predicted, where that is not all of them."""
    chosen = {name: run.config.data.sources[name].predict for name in sources}
    partly = {name: predict for name, predict in chosen.items() if predict != "all"}
    return {"predict": partly} if partly else {}


def _base(run: Run) -> dict[str, Any]:
    """The base, its tokenizer and how it computes; its place is not part of the recipe."""
    return {"base": run.fingerprint, "tokenizer": run.tokenizer, "model": run.config.compute}


_FIELDS_OF_MODES = {"topk": {"top_k", "value_bits"}, "sampled": {"draws"}, "hidden": {"hidden_dtype"}}


def _targets(run: Run) -> dict[str, Any]:
    """What is stored for each source, and the settings that decide it: those of other modes do not."""
    section, train = run.config.targets, run.config.train
    offline = train.mode == "offline"
    sources = [
        [name, offline and source.needs_output, offline and bool(source.router_kl)]
        for name, source in train.sources.items()
    ]
    recipe: dict[str, Any] = {"sources": sources, "max_tokens": section.max_tokens}
    output, router = any(source[1] for source in sources), any(source[2] for source in sources)
    if output or router:
        recipe["batch_sequences"] = section.batch_sequences
    if output:
        recipe |= section.model_dump(mode="json", include={"mode", *_FIELDS_OF_MODES[section.mode]})
        recipe["temperature"] = None if section.mode == "hidden" else train.output_temperature.constant
        recipe["seed"] = run.config.run.seed if section.mode == "sampled" else None
    if router:
        recipe |= section.model_dump(mode="json", include={"router", "router_layers", "router_every"})
        recipe["router_temperature"] = train.router_temperature.constant if section.router == "selected" else None
    return recipe


def _collect(run: Run, recipe: str) -> None:
    from nexus_ray.router.collect import collect

    collect(run.config, run.layout)


def _select(run: Run, recipe: str) -> None:
    from nexus_ray.router.artefact import RouterStatistics
    from nexus_ray.selection.figures.selection_figures import plot_selection
    from nexus_ray.selection.report.report import write_report
    from nexus_ray.selection.selection import select

    selection, statistics = select(run.config, run.layout), RouterStatistics.load(run.layout.router_stats)
    # Written before there are figures too: a figure that cannot be drawn does not cost the report.
    write_report(selection, statistics, run.layout.selection_report, run.layout.plots)
    plot_selection(selection, statistics, run.layout.plots)
    write_report(selection, statistics, run.layout.selection_report, run.layout.plots)
    logger.info("report on the selection: %s", run.layout.selection_report)


def _convert(run: Run, recipe: str) -> None:
    from nexus_ray.conversion.initialise import convert

    convert(run.config, run.layout)


def _check_targets(config: Config) -> None:
    from nexus_ray.targets.writing.job import job_of_run

    job_of_run(config)


def _precompute(run: Run, recipe: str) -> None:
    from nexus_ray.targets.writing.precompute import precompute_run

    precompute_run(run.config, run.layout)


def _target_files(place: Place) -> list[str]:
    from nexus_ray.targets.writing.shard_store import ShardStore

    return ShardStore(place).names()


def _train(run: Run, recipe: str) -> None:
    from nexus_ray.training.distil import train

    train(run.config, run.layout)


# Settings of training that change how it is done, watched or kept, not what comes out, rounding aside.
_WITHOUT_EFFECT = (
    "micro_batch_sequences",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "on_nan",
    "samples",
    "trackers",
    "warnings",
)


def _check_packages(config: Config) -> None:
    from nexus_ray.training.optimiser import check_optimiser
    from nexus_ray.training.watching.trackers import check_trackers

    check_optimiser(config.train.optimiser)
    check_trackers(config.train.trackers)


def _check_training(run: Run) -> None:
    from nexus_ray.training.distil import check_training

    check_training(run.config, run.layout)


def _unfinished_training(layout: RunLayout) -> str:
    from nexus_ray.training.recovery import steps_reached

    steps = steps_reached(local_only(layout.checkpoints))
    return f"a training that has reached step {steps}" if steps else ""


def _check_tasks(config: Config) -> None:
    from nexus_ray.evaluation.lm_eval_tasks import check_tasks

    check_tasks(config.evaluate.lm_eval)


def _evaluate(run: Run, recipe: str) -> None:
    from nexus_ray.evaluation.report import evaluate_and_report

    evaluate_and_report(run.config, run.layout)


ALL = (
    Stage(
        "collect",
        _collect,
        (),
        lambda run: {
            **_base(run),
            "data": _data(run, run.config.collect.mixture),
            "collect": _dump(run.config.collect),
            "run": {"seed": run.config.run.seed},
        },
        lambda layout: (
            layout.router_stats,
            layout.router_stats.with_suffix(".json"),
            layout.calibration,
            layout.calibration.with_suffix(".json"),
        ),
    ),
    Stage(
        "select",
        _select,
        ("collect",),
        lambda run: {"select": _dump(run.config.select), "roles": run.config.roles()},
        lambda layout: (layout.selection, layout.selection_report),
    ),
    Stage(
        "convert",
        _convert,
        ("select",),
        lambda run: {
            "convert": _dump(run.config.convert),
            "model": run.config.compute,
            "roles": run.config.roles(),
            "run": {"seed": run.config.run.seed},
        },
        lambda layout: (layout.initial_overlay, layout.conversion),
    ),
    Stage(
        "precompute",
        _precompute,
        (),
        lambda run: {
            **_base(run),
            "data": _data(run, run.config.train.sources) | _predicted(run, run.config.train.sources),
            "targets": _targets(run),
        },
        lambda layout: (layout.targets,),
        _target_files,
        reused=lambda layout: (layout.targets,),
        ahead=_check_targets,
    ),
    Stage(
        "train",
        _train,
        ("convert", "precompute"),
        lambda run: {
            **_base(run),
            "train": _dump(run.config.train, *_WITHOUT_EFFECT),
            "run": {"seed": run.config.run.seed},
        },
        lambda layout: (layout.overlay, layout.metrics),
        state=lambda layout: (
            layout.training,
            layout.checkpoints,
            layout.best,
            layout.metrics,
            layout.tensorboard,
            layout.trackers,
        ),
        unfinished=_unfinished_training,
        finished="a finished training",
        ahead=_check_packages,
        check=_check_training,
    ),
    Stage(
        "evaluate",
        _evaluate,
        ("train",),
        lambda run: {
            "evaluate": _dump(run.config.evaluate),
            "text": run.heldout_text,
            "roles": run.config.roles(),
            "tasks": run.task_files,
            **_predicted(run, [name for name, source in run.config.data.sources.items() if source.heldout]),
        },
        lambda layout: (layout.report, layout.report.with_suffix(".md")),
        ahead=_check_tasks,
    ),
)
BY_NAME = {stage.name: stage for stage in ALL}
