"""What the runs came to, as Markdown and as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from _comparison.measuring import Measured
from _comparison.methods import Method, Table
from _comparison.results import Results, base_losses, final_runs
from _comparison.settings import Settings
from _comparison.statistics import Estimate, crossed_mean
from _comparison.training import Losses
from _comparison.verdicts import verdict
from nexus_ray.errors import ArtefactError
from nexus_ray.storage import write_text
from nexus_ray.training.losses.chunked import CROSS_ENTROPY, OUTPUT_KL
from nexus_ray.training.losses.objective import objective_at

REFERENCE = "shared"
BEGIN, END = "<!-- written by benchmarks/comparison.py --write-docs -->", "<!-- end of what it wrote -->"
_TITLES: dict[Table, str] = {
    "budget": "At the shared expert's number of trainable parameters",
    "usual": "At each method's usual setting",
    "start": "Initialisations of the shared expert, and its gate",
    "variants": "Variants of the shared expert",
}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What a method came to on held-out text, nats a token but where it says otherwise.

    Attributes:
        parameters: trainable ones.
        learning_rate: the best on validation text.
        runs: seeds.
        losses: by source, cross-entropy.
        changes: by source, cross-entropy less the base's.
        objective: the training objective.
        objective_difference: objective less that of the reference; None of the reference itself.
        domain_difference: the domain's cross-entropy less the reference's; likewise.
        retention_difference: KL to the base on retention text less the reference's; likewise.
    """

    parameters: int
    learning_rate: float
    runs: int
    losses: dict[str, Estimate]
    changes: dict[str, Estimate]
    objective: Estimate
    objective_difference: Estimate | None
    domain_difference: Estimate | None
    retention_difference: Estimate | None


def rows(methods: Sequence[Method], results: Results, settings: Settings) -> dict[str, Row]:
    """A row for each method that has finished runs, by name."""
    base = base_losses(settings)
    reference = final_runs(results, REFERENCE, settings.seeds)
    found = {method.name: final_runs(results, method.name, settings.seeds) for method in methods}
    return {name: _row(runs, reference, base, settings) for name, runs in found.items() if runs}


def _row(runs: list[dict[str, Any]], reference: list[dict[str, Any]], base: Losses, settings: Settings) -> Row:
    names = list(base)
    (domain,), retention = settings.of_role("domain"), settings.of_role("retention")

    def against(values: Callable[[Losses], Floats]) -> Estimate | None:
        return None if runs == reference else _paired(runs, reference, values)

    return Row(
        parameters=runs[0]["parameters"],
        learning_rate=runs[0]["learning_rate"],
        runs=len(runs),
        losses={name: crossed_mean(_matrix(runs, _of(CROSS_ENTROPY, [name]))) for name in names},
        changes={
            name: crossed_mean(_matrix(runs, _of(CROSS_ENTROPY, [name])) - np.array(base[name][CROSS_ENTROPY]))
            for name in names
        },
        objective=crossed_mean(_matrix(runs, lambda losses: objectives(losses, settings))),
        objective_difference=against(lambda losses: objectives(losses, settings)),
        domain_difference=against(_of(CROSS_ENTROPY, [domain])),
        retention_difference=against(_of(OUTPUT_KL, retention)),
    )


def objectives(losses: Losses, settings: Settings) -> Floats:
    """[n] the training objective of the n-th held-out sequences of all sources together."""
    weights = objective_at(settings.config.train, 1.0).weights
    total: Floats = np.zeros(1)
    for term in (CROSS_ENTROPY, OUTPUT_KL):
        mine = [name for name in weights if term in weights[name]]
        for name in mine:
            total = total + weights[name][term] / len(mine) * np.array(losses[name][term])
    return total


def _of(term: str, names: Sequence[str]) -> Callable[[Losses], Floats]:
    """[n] one term, the mean over some sources, of their n-th held-out sequences."""
    return lambda losses: np.mean([losses[name][term] for name in names], axis=0)


def _matrix(runs: list[dict[str, Any]], values: Callable[[Losses], Floats]) -> Floats:
    return np.stack([values(run["losses"]) for run in runs])


def _paired(
    runs: list[dict[str, Any]], reference: list[dict[str, Any]], values: Callable[[Losses], Floats]
) -> Estimate | None:
    """Difference over the seeds that both have."""
    by_seed = {run["seed"]: run for run in reference}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs:
        return None
    return crossed_mean(np.stack([values(run["losses"]) - values(other["losses"]) for run, other in pairs]))


def tables(
    methods: Sequence[Method], results: Results, measured: Mapping[tuple[str, str], Measured], settings: Settings
) -> str:
    """All tables as Markdown."""
    found = rows(methods, results, settings)
    parts = [_sizes(settings)]
    for table, title in _TITLES.items():
        mine = [method for method in methods if table in method.tables and method.name in found]
        if any(method.name != REFERENCE for method in mine):
            parts.append(f"### {title}\n\n" + _table(mine, found, settings))
            parts.append(_verdicts(mine, found, settings))
    if measured:
        parts.append("### Memory and speed\n\n" + _measures(methods, measured))
    return "\n\n".join(parts)


def _sizes(settings: Settings) -> str:
    base = base_losses(settings)
    levels = ", ".join(f"{name} {np.exp(np.mean(losses[CROSS_ENTROPY])):.2f}" for name, losses in base.items())
    per_step = ", ".join(f"{count} of {name}" for name, count in settings.config.sequences_per_step().items())
    return (
        f"{settings.steps} steps of sequences of {settings.config.data.sequence_length} tokens ({per_step}), up to "
        f"{settings.seeds} seeds, {settings.test_sequences} held-out sequences of each source. Perplexity of the base "
        f"on them: {levels}."
    )


def _table(methods: Sequence[Method], found: Mapping[str, Row], settings: Settings) -> str:
    (domain,), retention = settings.of_role("domain"), settings.of_role("retention")
    heads = ["method", "trained", "learning rate", "seeds", f"{domain} perplexity", *retention, "objective"]
    heads += [f"{domain}, less", "KL of retention, less", "objective, less"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in methods:
        row = found[method.name]
        cells = [method.label, f"{row.parameters:,}", f"{row.learning_rate:g}", str(row.runs)]
        cells += [_perplexity(row.losses[domain]), *(_change(row.changes[name]) for name in retention)]
        cells += [f"{row.objective.value:.4f}"]
        differences = (row.domain_difference, row.retention_difference, row.objective_difference)
        lines.append("| " + " | ".join(cells + [_difference(each) for each in differences]) + " |")
    return "\n".join(lines)


def _verdicts(methods: Sequence[Method], found: Mapping[str, Row], settings: Settings) -> str:
    """What the table says, in sentences."""
    (domain,) = settings.of_role("domain")
    quantities: dict[str, Callable[[Row], Estimate | None]] = {
        f"The loss on {domain}": lambda row: row.domain_difference,
        "The KL to the base on retention text": lambda row: row.retention_difference,
        "The objective": lambda row: row.objective_difference,
    }
    lines = []
    for quantity, difference_of in quantities.items():
        differences = {method.label: difference_of(found[method.name]) for method in methods}
        lines.append(verdict(quantity, {label: each for label, each in differences.items() if each is not None}))
    return "\n".join(lines)


def _perplexity(nats: Estimate) -> str:
    value, low, high = np.exp([nats.value, nats.low, nats.high])
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _change(nats: Estimate) -> str:
    value, low, high = 100 * np.expm1([nats.value, nats.low, nats.high])
    return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"


def _difference(nats: Estimate | None) -> str:
    if nats is None:
        return "-"
    text = f"{nats.value:+.4f} ({nats.low:+.4f} to {nats.high:+.4f})"
    return f"**{text}**" if nats.excludes_zero else text


def _measures(methods: Sequence[Method], measured: Mapping[tuple[str, str], Measured]) -> str:
    lines = ["| method | routed experts | peak MiB | tokens/s |", "|---|---|---|---|"]
    words = {"eager": "dequantised", "packed": "packed"}
    for method in methods:
        for (name, form), values in measured.items():
            if name == method.name:
                figures = f"{values.peak_mib:,.0f} | {values.tokens_per_second:,.0f}"
                lines.append(f"| {method.label} | {words[form]} | {figures} |")
    return "\n".join(lines)


def summary(
    methods: Sequence[Method], results: Results, measured: Mapping[tuple[str, str], Measured], settings: Settings
) -> dict[str, Any]:
    """The same as numbers, for the last line."""
    found = rows(methods, results, settings)
    return {
        "steps": settings.steps,
        "seeds": settings.seeds,
        "runs": len(results),
        "methods": {name: asdict(row) for name, row in found.items()},
        "measured": {f"{name}, {form}": asdict(values) for (name, form), values in measured.items()},
    }


def write_docs(path: Path, text: str) -> None:
    """Put the tables between the marks of a document.

    Raises:
        ArtefactError: the document has no marks.
    """
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ArtefactError(f"{path} does not say where the tables go", f"give it the lines {BEGIN} and {END}")
    write_text(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
