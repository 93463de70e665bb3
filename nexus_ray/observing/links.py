"""Where Ray's dashboard shows a command, said once, where there is a dashboard."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from nexus_ray.observing.command import record

logger = logging.getLogger(__name__)
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray hands to the entry point of a submitted job
_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"  # with it Ray Train describes its runs to the dashboard
_dashboard = ""


def tell_ray(context: Any) -> None:
    """Log the dashboard's page of this job, and record what the command is connected to.

    Args:
        context: what `ray.init` returned.
    """
    import ray

    global _dashboard
    job, _dashboard = ray.get_runtime_context().get_job_id(), address(context.dashboard_url)
    resources = ray.cluster_resources()
    known = {"submission": submission_of(os.environ), "dashboard": job_page(_dashboard, job)}
    record(
        "ray",
        address=context.address_info.get("gcs_address"),
        job=job,
        **{name: value for name, value in known.items() if value},
        nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
    )
    if _dashboard:
        logger.info("dashboard: %s", known["dashboard"])


def tell_training() -> None:
    """Log where Ray Train's runs are described, where Ray has been told to keep descriptions of them.

    The dashboard that comes with Ray has no page for them, only this JSON; their workers are on the job's page.
    """
    if _dashboard and os.environ.get(_TRACKING, "0").lower() in ("1", "true"):
        page = f"{_dashboard}/api/train/v2/runs/v1"
        logger.info("Ray Train's runs: %s", page)
        record("train_view", dashboard=page)


def address(dashboard: str | None) -> str:
    """The dashboard's address with its scheme, "" where there is none."""
    if not dashboard:
        return ""
    return dashboard.rstrip("/") if "://" in dashboard else f"http://{dashboard}"


def job_page(dashboard: str, job: str) -> str:
    """The dashboard's page of a job, "" without a dashboard."""
    return f"{dashboard}/#/jobs/{job}" if dashboard else ""


def submission_of(environment: Mapping[str, str]) -> str:
    """The name that `ray job logs` and `ray job stop` know this job by, "" where it was not submitted."""
    try:
        metadata = json.loads(environment.get(_JOB_CONFIG, "{}")).get("metadata", {})
    except ValueError:
        return ""
    return str(metadata.get("job_submission_id", ""))
