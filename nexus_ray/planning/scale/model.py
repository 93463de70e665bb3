"""The scale model of a run: all stages in order, and the money at the configured or published price."""

from __future__ import annotations

from collections.abc import Mapping

from nexus_ray.config import Config
from nexus_ray.planning.hardware import GPUS
from nexus_ray.planning.machine import Machine
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.after import evaluate, export, serve_start
from nexus_ray.planning.scale.before import base_on_nodes, collect, convert, select
from nexus_ray.planning.scale.costs import RunCost
from nexus_ray.planning.scale.learning import train
from nexus_ray.planning.scale.run import PlannedRun, with_assumed_text
from nexus_ray.planning.scale.teaching import precompute
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.worker import Worker


def run_cost(
    config: Config,
    sizes: ModelSizes,
    text: Mapping[str, SourceText],
    machine: Machine,
    heldout: Mapping[str, int] | None = None,
) -> RunCost:
    """Time, GPU-hours and money of every stage.

    Args:
        config: the run.
        sizes: of the base.
        text: training text by source, as far as it is known; of the rest as much as training reads once is assumed.
        machine: what the run is planned for.
        heldout: tokens that `evaluate` reads of each source, as far as they are known.
    """
    run = planned_run(config, sizes, text, machine, heldout)
    stages = (collect(run), select(run), convert(run), precompute(run), train(run), evaluate(run))
    before = (base_on_nodes(run),) if run.is_remote else ()
    return RunCost((*before, *stages, export(run), serve_start(run)), price_of(config, machine), _assumed(run))


def planned_run(
    config: Config,
    sizes: ModelSizes,
    text: Mapping[str, SourceText],
    machine: Machine,
    heldout: Mapping[str, int] | None = None,
) -> PlannedRun:
    """What the model works with; arguments as `run_cost`."""
    whole = with_assumed_text(config, text)
    worker = Worker.of(config, sizes, whole)
    known = heldout or {}
    read = {
        name: known.get(name, int(figures.HELDOUT)) for name, source in config.data.sources.items() if source.heldout
    }
    return PlannedRun(config, worker, machine, whole, read)


def price_of(config: Config, machine: Machine) -> float | None:
    """Money for one GPU for one hour; nothing where the run has no GPUs."""
    if config.plan.price_per_gpu_hour is not None:
        return config.plan.price_per_gpu_hour
    named = config.plan.hardware is not None and machine.gpu is not None
    return GPUS[machine.gpu].price if named and machine.gpu else None


def _assumed(run: PlannedRun) -> str:
    """What the times rest on."""
    if not run.on_gpu:
        return "by a layer's parts timed on this machine"
    speed = run.gpu.flop * figures.UTILISATION / 1e12
    return (
        f"by arithmetic: {run.gpu.name}, products at {speed:,.0f} TFLOP/s ({figures.UTILISATION:.0%} of its peak), "
        f"{figures.LAUNCH * 1e6:.0f} us a kernel; assumed, no GPU was measured"
    )
