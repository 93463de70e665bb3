"""The tables of docs/scaling.md, written by the functions that `nexus-ray plan` uses.

`tools/scaling_page.py` puts them between the page's markers; a test compares the page with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nexus_ray.config import Config, load_config
from nexus_ray.planning.allotment import replaced
from nexus_ray.planning.cost_table import bytes_text, duration_text, money_text
from nexus_ray.planning.hardware import GPUS as KINDS
from nexus_ray.planning.hardware import parse_hardware
from nexus_ray.planning.machine import cluster_machine
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.bottlenecks import BOTTLENECKS
from nexus_ray.planning.scale.costs import RunCost, StageCost
from nexus_ray.planning.scale.model import run_cost
from nexus_ray.planning.scale.scenarios import (
    GPU,
    GPUS,
    MODELS,
    TOKENS,
    Outcome,
    Scenario,
    outcome,
    planned,
    published_sizes,
)
from nexus_ray.planning.target_sizes import source_targets

EXAMPLE_GPUS = {"gpt-oss-20b": 2, "gpt-oss-120b": 4}
_TARGETS: dict[str, dict[str, object]] = {
    "`topk`, 64 in 4 bits (default)": {"targets.top_k": 64},
    "`topk`, 50": {"targets.top_k": 50},
    "`sampled`, 12 draws": {"targets.mode": "sampled"},
    "`hidden`, float8": {"targets.mode": "hidden", "targets.hidden_dtype": "float8"},
    "`hidden`, bfloat16": {"targets.mode": "hidden"},
}
Runs = dict[tuple[int, int], Outcome]
_MARKER = re.compile(r"(<!-- begin (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def page_tables(configs: Path) -> dict[str, str]:
    """Every table of the page in Markdown, by the name of its marker; `configs`: directory of the examples."""
    tables = {"figures": figures_table(), "hardware": hardware_table(), "published": published_table()}
    for model in MODELS:
        runs = {(tokens, gpus): outcome(Scenario(model, tokens, gpus), configs) for tokens in TOKENS for gpus in GPUS}
        tables |= {
            f"example-{model}": example_table(example_cost(model, configs)),
            f"precompute-{model}": grid(runs, "precompute", _stage_cell("precompute")),
            f"train-{model}": grid(runs, "train", _stage_cell("train")),
            f"run-{model}": grid(runs, "train", _run_cell),
            f"others-{model}": others_table(runs),
        }
    return tables | {"storage": storage_table(configs), "bottlenecks": bottleneck_table(configs)}


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with these tables between its markers.

    Raises:
        ValueError: a marker has no table, or a table no marker.
    """
    names = {match["name"] for match in _MARKER.finditer(page)}
    if names != set(tables):
        raise ValueError(f"markers and tables differ: {sorted(names ^ set(tables))}")
    return _MARKER.sub(lambda match: f"{match[1]}{tables[match['name']]}\n{match[3]}", page)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures_table() -> str:
    """Every per-unit figure with its provenance, kind by kind."""
    kinds = ("measured here", "exact", "published elsewhere", "assumed")
    found = sorted(figures.FIGURES, key=lambda figure: kinds.index(figure.kind))
    rows = [[figure.what, f"{figure.value:,g} {figure.unit}", figure.kind, figure.source] for figure in found]
    return markdown(["figure", "value", "kind", "source"], rows)


def hardware_table() -> str:
    """The GPUs that `plan.hardware` knows."""
    header = [
        "`plan.hardware`",
        "memory",
        "dense bf16",
        "memory bandwidth",
        "to a neighbour",
        "node",
        "price",
        "source",
    ]
    rows = [
        [
            f"`{gpu.name}`",
            f"{gpu.memory / 1e9:.0f} GB",
            f"{gpu.flop / 1e12:.0f} TFLOP/s",
            f"{gpu.bandwidth / 1e9:,.0f} GB/s",
            f"{gpu.link / 1e9:.0f} GB/s",
            f"{gpu.node_memory >> 30:,} GiB, {gpu.node_network * 8 / 1e9:,.0f} Gbit/s",
            "none" if gpu.price is None else f"${gpu.price:g}",
            f"{gpu.sheet}; {gpu.offer}",
        ]
        for gpu in KINDS.values()
    ]
    return markdown(header, rows)


def published_table() -> str:
    """What others' speeds mean as a share of the peak."""
    peak, rows = KINDS["h100"].flop, list[list[str]]()
    for model, gpus, speed, active in figures.AUTOMODEL:
        share = figures.published_utilisation(speed, active, peak)
        rows.append([model, f"{gpus} H100", f"{speed:,}", f"{6 * active * speed / 1e12:.0f}", f"{share:.1%}"])
    return markdown(["model", "on", "tokens/s a GPU", "TFLOP/s a GPU", "of 989"], rows)


def example_cost(model: str, configs: Path) -> RunCost:
    """What `nexus-ray plan configs/MODEL.yaml --hardware h100xN` says of a run without text at hand."""
    config = load_config(configs / f"{model}.yaml", [f"plan.hardware={GPU}x{EXAMPLE_GPUS[model]}"])
    return run_cost(config, published_sizes(model), {}, cluster_machine(parse_hardware(config.plan.hardware or GPU)))


def example_table(found: RunCost) -> str:
    """One row a stage, as the command prints it."""
    rows = [
        [
            stage.stage,
            duration_text(stage.seconds),
            duration_text(stage.fixed_seconds),
            max(stage.parts, key=lambda part: part.seconds).name,
            f"{stage.gpu_hours:,.2f}" if stage.gpus else "",
            bytes_text(stage.moved),
            f"${money_text(stage.money(found.price or 0.0))}" if stage.gpus else "",
        ]
        for stage in found.stages
    ]
    total = ["sum", duration_text(found.seconds), "", "", f"{found.gpu_hours:,.1f}"]
    rows.append([*total, "", f"${money_text(found.money or 0.0)}"])
    return markdown(["stage", "time", "fixed", "mostly", "GPU-hours", "moved", "cost"], rows)


def grid(runs: Runs, needed: str, cell: Callable[[RunCost], str]) -> str:
    """Tokens downwards, GPUs across; `needed`: the stage that must fit."""
    rows = []
    for tokens in TOKENS:
        found = [runs[tokens, gpus] for gpus in GPUS]
        cells = ("does not fit" if needed in each.too_small else cell(each.cost) for each in found)
        rows.append([tokens_text(tokens), *cells])
    return markdown(["tokens", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)], rows)


def tokens_text(tokens: int) -> str:
    """1 M to 10 B."""
    return f"{tokens // 10**9} B" if tokens >= 10**9 else f"{tokens // 10**6} M"


def stage_of(found: RunCost, name: str) -> StageCost:
    """A stage by its name."""
    return next(stage for stage in found.stages if stage.stage == name)


def _stage_cell(name: str) -> Callable[[RunCost], str]:
    def cell(found: RunCost) -> str:
        stage = stage_of(found, name)
        return f"{duration_text(stage.seconds)}, ${money_text(stage.money(found.price or 0.0))}"

    return cell


def _run_cell(found: RunCost) -> str:
    return f"{duration_text(found.seconds)}, {found.gpu_hours:,.0f} GPU-h, ${money_text(found.money or 0.0)}"


def others_table(runs: Runs) -> str:
    """Stages that hardly depend on the tokens, at the fewest and the most of them."""
    names = ("base on nodes", "collect", "select", "convert", "evaluate", "export", "serve start")
    columns = [(tokens, gpus) for tokens in (TOKENS[0], TOKENS[-1]) for gpus in GPUS[1:]]
    rows = []
    for name in names:
        found = [stage_of(runs[column].cost, name) for column in columns]
        rows.append([name, *(duration_text(stage.seconds) for stage in found)])
    return markdown(["stage", *(f"{tokens_text(tokens)}, {gpus} GPUs" for tokens, gpus in columns)], rows)


def storage_table(configs: Path) -> str:
    """Bytes of a token, and of 10 B tokens of which half have a teacher, by mode; routers beside them."""
    rows = [_storage_row(form, settings, configs) for form, settings in _TARGETS.items()]
    rows.append(_storage_row("tokens only (`train.mode: online`)", {"train.mode": "online"}, configs))
    for router in ("logits", "selected"):
        rows.append(_storage_row(f"routers of 120B, `{router}`, beside them", {"targets.router": router}, configs))
    return markdown(["targets", "bytes/token with a teacher", "10 B tokens, half with a teacher"], rows)


def _storage_row(form: str, settings: dict[str, object], configs: Path) -> list[str]:
    model = "gpt-oss-120b"
    config = replaced(Scenario(model, TOKENS[-1], GPUS[-1]).config(configs), settings)
    if "targets.router" in settings:
        config = _routers_only(config)
    taught = source_targets(config, published_sizes(model), {})["general"]
    plain = source_targets(config, published_sizes(model), {})["domain"]
    size = TOKENS[-1] / 2 * (taught.bytes_per_token + plain.bytes_per_token)
    if "targets.router" in settings:  # beside: without the tokens
        each, size = taught.bytes_per_token - plain.bytes_per_token, size - TOKENS[-1] * plain.bytes_per_token
        return [form, f"{each:,.0f}", bytes_text(size)]
    return [form, f"{taught.bytes_per_token:,.0f}", bytes_text(size)]


def _routers_only(config: Config) -> Config:
    values = config.model_dump()
    values["train"]["sources"]["general"] |= {"output_kl": 0.0, "router_kl": 1.0}
    return Config.model_validate(values)


def bottleneck_table(configs: Path) -> str:
    """What does not get faster with more GPUs, at 100 M, 1 B and 10 B tokens of 120B on 64 GPUs; largest first."""
    runs = [planned(Scenario("gpt-oss-120b", tokens, 64), configs) for tokens in TOKENS[2:]]
    found = [(each, [each.seconds(run) for run in runs]) for each in BOTTLENECKS]
    rows = [
        [each.what, each.where, *(duration_text(seconds) for seconds in times)]
        for each, times in sorted(found, key=lambda pair: -pair[1][-1])
    ]
    return markdown(["what", "where", *(tokens_text(tokens) for tokens in TOKENS[2:])], rows)
