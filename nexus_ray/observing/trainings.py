"""What a training tells, from the worker that keeps its log and from Ray Train's controller, which sees workers die."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nexus_ray.observing.command import Origin, record, telling_from
from nexus_ray.observing.metrics import add, put

if TYPE_CHECKING:
    from ray.train import UserCallback

# Warnings and skipped steps are logged by the driver, which makes events of them.
_TOLD = ("resume", "checkpoint", "validation", "best", "early_stop", "preemption", "stopped")
_GAUGES = {
    "loss": "nexus_ray_train_loss",
    "gradient_norm": "nexus_ray_train_gradient_norm",
    "seconds": "nexus_ray_train_step_seconds",
    "tokens_per_second": "nexus_ray_stage_tokens_per_second",
}
_LONGEST_REASON = 500  # characters; the log has all of it
_tokens = 0  # in the loss, since this process began: the driver does not see them


def watch_training(event: str, step: int, values: Mapping[str, Any]) -> None:
    """Tell of a record of `metrics.jsonl` (`step` is 0 for the first), where others want to know."""
    global _tokens
    if event in _TOLD:
        shown = {name: values[name] for name in ("loss", "reason") if name in values}
        record(event, step=step + 1, tokens=_tokens, **shown)
    if event == "step":
        _tokens += int(values.get("tokens", 0))
        put("nexus_ray_train_step", step + 1)
        for name, metric in _GAUGES.items():
            if name in values:
                put(metric, values[name])
        add("nexus_ray_stage_tokens", float(values.get("tokens", 0)))
    elif event == "validation":
        put("nexus_ray_train_validation_loss", values["loss"])


def watch_checkpoint(seconds: float, size: int) -> None:
    """Tell of a recovery checkpoint that was written in so many seconds and takes `size` bytes."""
    put("nexus_ray_checkpoint_seconds", seconds)
    add("nexus_ray_checkpoint_bytes", size)


def failure_callback(origin: Origin | None) -> UserCallback:
    """What Ray Train's controller calls when workers of a training have died or failed."""
    from ray.train import UserCallback

    class TellOfFailures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            with telling_from(origin, "controller of Ray Train"):
                record_failures(worker_exceptions)

    return TellOfFailures()


def record_failures(failures: Mapping[int, Exception]) -> None:
    """One event for workers that failed together, by rank, with the first one's reason."""
    ranks = sorted(failures)
    first = failures[ranks[0]]
    lines = str(first).strip().splitlines() or [type(first).__name__]
    record("workers_failed", ranks=ranks, error=type(first).__name__, reason=lines[-1][:_LONGEST_REASON])
    add("nexus_ray_stage_worker_restarts", len(ranks))
