"""The last lines of a verb: where what it made lies, for people and, where no person is looking, for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from nexus_ray.cli.app import output
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place, is_remote


def say_done(verb: str, artefacts: Mapping[str, Place]) -> None:
    """Print `done: NAME PLACE, ...`; in a job or a pipe one JSON object follows, the last line.

    Args:
        verb: what is done, as it stands after `nexus-ray`.
        artefacts: {name: place}; those that are not there are left out.
    """
    places = {name: _whole(place) for name, place in artefacts.items() if place.exists()}
    listed = ", ".join(f"{name} {place}" for name, place in places.items())
    output.print(f"done: {listed or 'nothing was made'}", highlight=False, markup=False, soft_wrap=True)
    if not output.is_terminal:
        sys.stdout.write(json.dumps({"done": verb, "artefacts": places}) + "\n")
        sys.stdout.flush()


def artefacts_of(layout: RunLayout, stage: str) -> dict[str, Place]:
    """{name: place} of what a stage is run for."""
    report = layout.report.with_suffix(".md")
    artefacts: dict[str, dict[str, Place]] = {
        "collect": {"router_stats": layout.router_stats},
        "select": {"selection": layout.selection, "report": layout.selection_report},
        "convert": {"initial_overlay": layout.initial_overlay},
        "precompute": {"targets": layout.targets},
        "train": {"overlay": layout.overlay},
        "evaluate": {"overlay": layout.overlay, "report": report},
    }
    return artefacts[stage]


def _whole(place: Place) -> str:
    """A URI as it is; a local path as it is found from anywhere on this machine."""
    return str(place if is_remote(place) else place.resolve())
