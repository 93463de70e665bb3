"""Finished runs, and the base beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from _comparison.methods import Student
from _comparison.settings import Settings
from _comparison.text import load_text
from _comparison.training import Losses, Run, evaluate
from nexus_ray.modeling.loading import load_base
from nexus_ray.storage import write_json

Results = Mapping[Run, dict[str, Any]]


def load_results(settings: Settings) -> Results:
    """Every finished run of the comparison, by what was run."""
    found = {}
    for path in sorted(settings.runs.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[Run(result["method"], result["learning_rate"], result["seed"])] = result
    return found


def final_runs(results: Results, method: str, seeds: int) -> list[dict[str, Any]]:
    """A method's runs on held-out text that ended well, in the order of their seeds."""
    mine = [(run.seed, result) for run, result in results.items() if run.method == method and run.seed in range(seeds)]
    return [result for _, result in sorted(mine, key=lambda pair: pair[0]) if result["losses"] is not None]


def base_losses(settings: Settings) -> Losses:
    """What the base loses on the held-out sequences, as `evaluate` gives it; computed once."""
    path = settings.start / "base.json"
    if not path.exists():
        losses = evaluate(Student(load_base(settings.config.model), {}), load_text(settings, "heldout"))
        write_json(path, losses)
    return cast(Losses, json.loads(path.read_text(encoding="utf-8")))
