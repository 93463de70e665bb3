"""What each mode of teacher targets is worth: held-out loss after the same training from the same start.

Trains the demo's shared experts, which start at the base's function, once for each mode: the same text in the same
order, the same number of tokens, the same weights of the losses. Only what is known of the teacher differs:

    online   the teacher itself, on the fly: what stored targets are measured against
    topk     the most likely tokens and the mass of the rest
    sampled  draws from the teacher's distribution; a fourfold number of draws too
    hidden   final hidden states, in bfloat16 and in float8
    none     tokens only: nothing holds the model to what it was; the retention sources have no loss and are left out,
             so that a step has the same tokens of the domain and no others

Runs are kept in `--directory`: the same command continues what was stopped. Prints a Markdown table (differences to the
base, in nats a token, with 95 % intervals over the held-out sequences of this one run) and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import command_line, print_result

from nexus_ray.config import Config, load_config
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_pipeline
from nexus_ray.storage import make_directory, read_json
from nexus_ray.targets.reading.reader import TargetSet

_ROOT = Path(__file__).parents[1]
_VARIANTS = {
    "online": ["train.mode=online"],
    "topk": ["targets.mode=topk"],
    "sampled": ["targets.mode=sampled"],
    "sampled, 4 x": ["targets.mode=sampled", "targets.draws=48"],
    "hidden, bfloat16": ["targets.mode=hidden"],
    "hidden, float8": ["targets.mode=hidden", "targets.hidden_dtype=float8"],
    "none": ["targets.mode=none"],
}


@dataclass(frozen=True)
class Outcome:
    """What one variant came to.

    Attributes:
        bytes_per_token: of the retention sources' shards, tokens and targets together.
        losses: {source: {"base", "student", "difference", "interval"}} in nats a token of held-out text.
    """

    bytes_per_token: float
    losses: dict[str, dict[str, Any]]


def variant_config(arguments: argparse.Namespace, name: str) -> Config:
    """The demo with one mode of targets; without a teacher the retention sources have no loss and are left out."""
    slug = name.replace(", ", "-").replace(" ", "")
    overrides = [f"run.directory={arguments.directory / slug}", f"train.steps={arguments.steps}", *_VARIANTS[name]]
    if name == "none":
        sources = load_config(arguments.config).train.sources.items()
        kept = {key: section.model_dump(mode="json") for key, section in sources if not section.output_kl}
        overrides.append(f"train.sources={json.dumps(kept)}")
    return load_config(arguments.config, overrides)


def share_start(config: Config, first: RunLayout) -> None:
    """Copy what the runs have in common, the initial overlay and what it was made from, unless it is there."""
    directory = RunLayout(config.run.directory).directory
    if (directory / "stages").exists() or directory == first.directory:
        return
    make_directory(directory / "stages")
    for stage in ("collect", "select", "convert"):
        shutil.copy2(first.stages / f"{stage}.json", directory / "stages")
    for path in (first.calibration, first.router_stats):
        for file in (path, path.with_suffix(".json")):
            shutil.copy2(file, directory)
    for file in (first.selection, first.selection_report, first.conversion):
        shutil.copy2(file, directory)
    shutil.copytree(first.initial_overlay, directory / first.initial_overlay.name)


def outcome(config: Config) -> Outcome:
    """Read what a finished run left."""
    layout = RunLayout(config.run.directory)
    manifest = TargetSet.open(layout.targets).manifest
    retention = {name for name, source in config.data.sources.items() if source.role == "retention"}
    files = [file for file in manifest.files if file.source in retention]
    tokens = sum(file.tokens for file in files)
    report = read_json(layout.report, what="report", hint="run again")["evaluation"]
    losses = {
        name: {
            "base": entry["base"]["nats_per_token"],
            "student": entry["student"]["nats_per_token"],
            "difference": entry["nats_difference"]["value"],
            "interval": entry["nats_difference"]["confidence_interval"],
        }
        for name, entry in report.items()
    }
    return Outcome(sum(file.bytes for file in files) / tokens if tokens else 0.0, losses)


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as Markdown."""
    names = list(next(iter(outcomes.values())).losses)
    base = next(iter(outcomes.values())).losses
    lines = [
        "| targets | bytes/token | " + " | ".join(f"{name} (base {base[name]['base']:.3f})" for name in names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for variant, found in outcomes.items():
        cells = [_cell(found.losses[name]) for name in names]
        size = f"{found.bytes_per_token:,.0f}" if found.bytes_per_token else "-"
        lines.append(f"| {variant} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(loss: dict[str, Any]) -> str:
    low, high = loss["interval"]
    return f"{loss['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def main() -> None:
    """Train every variant and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=_ROOT / "configs" / "demo.yaml")
    parser.add_argument("--directory", type=Path, default=_ROOT / "build" / "targets-modes", help="of the runs")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--only", nargs="+", choices=_VARIANTS, default=list(_VARIANTS), help="these variants")
    arguments = parser.parse_args()
    with command_line():
        configs = {name: variant_config(arguments, name) for name in arguments.only}
        first = RunLayout(next(iter(configs.values())).run.directory)
        run_pipeline(next(iter(configs.values())), last="convert")
        for config in configs.values():
            share_start(config, first)
            run_pipeline(config)
        outcomes = {name: outcome(config) for name, config in configs.items()}
        print(table(outcomes))
        print_result(
            {
                "steps": arguments.steps,
                "variants": {name: vars(found) for name, found in outcomes.items()},
            }
        )


if __name__ == "__main__":
    main()
