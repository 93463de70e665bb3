"""One run: a method trained on its share of the text, and what it then loses on text that it has not seen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from _comparison.methods import METHODS, Student, build
from _comparison.settings import TUNING_SEED, Settings
from _comparison.text import Part, load_text, orders
from nexus_ray.storage import make_directory, write_json
from nexus_ray.targets.teacher import HiddenTargets
from nexus_ray.training.losses.chunked import CROSS_ENTROPY, OUTPUT_KL, output_losses
from nexus_ray.training.losses.objective import objective_at, shares, term_counts
from nexus_ray.training.schedule import learning_rate

_EVALUATION_BATCH = 8
Losses = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: name of the method.
        learning_rate: its peak.
        seed: of data order and random weights.
    """

    method: str
    learning_rate: float
    seed: int

    def path(self, settings: Settings) -> Path:
        """Where its result is written."""
        return settings.runs / f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}.json"

    @property
    def is_tuning(self) -> bool:
        """Whether it is there to choose a learning rate."""
        return self.seed == TUNING_SEED


def run_one(run: Run, settings: Settings) -> dict[str, Any]:
    """Train, evaluate and write the result.

    A run that chooses a learning rate is measured on validation sequences of the training text, which it did not train
    on, and never sees held-out text; the others are measured on held-out text. A run whose loss is no longer finite
    has `losses` None.
    """
    torch.set_num_threads(1)
    text = load_text(settings, "train")
    student = build(METHODS[run.method], settings, run.seed)
    started = time.perf_counter()
    finite = _train(student, text, run, settings)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = asdict(run) | {"parameters": student.count, "train_seconds": seconds, "losses": None}
    if finite:
        result["losses"] = evaluate(student, _unseen(text, run, settings))
        result["objective"] = objective(result["losses"], settings)
    make_directory(settings.runs)
    write_json(run.path(settings), result)
    return result


def steps_of(student: Student, text: Mapping[str, Part], run: Run, settings: Settings) -> Iterator[float]:
    """Train a step at a time; yields the gradient norm of each before clipping, until one is not finite."""
    section = settings.config.train.optimiser
    optimiser = _optimiser(student, settings)
    order = orders(settings, dict(text), run.seed)
    for step in range(settings.steps):
        batch = {name: text[name].rows(order[name].of_step(step)) for name in order}
        batch_loss(student, batch, settings).backward()
        norm = float(nn.utils.clip_grad_norm_(student.parameters.values(), section.clip_norm))
        if not np.isfinite(norm):
            return
        for group in optimiser.param_groups:
            peak = run.learning_rate * group["factor"]
            group["lr"] = learning_rate(step, settings.steps, peak, section.schedule)
        optimiser.step()
        optimiser.zero_grad()
        yield norm


def _optimiser(student: Student, settings: Settings) -> torch.optim.AdamW:
    train = settings.config.train
    groups: list[dict[str, Any]] = [
        {
            "params": [p for name, p in student.parameters.items() if (name in student.slow) == is_slow],
            "factor": train.routers.learning_rate_factor if is_slow else 1.0,
        }
        for is_slow in (False, True)
    ]
    betas = (train.optimiser.beta1, train.optimiser.beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=train.optimiser.weight_decay)


def _train(student: Student, text: Mapping[str, Part], run: Run, settings: Settings) -> bool:
    """Train all steps; whether that ended with finite weights."""
    done = sum(1 for _ in steps_of(student, text, run, settings))
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters.values())
    return done == settings.steps and finite


def batch_loss(student: Student, batch: Mapping[str, tuple[Tensor, Tensor | None]], settings: Settings) -> Tensor:
    """The training objective of one global batch, in one forward pass.

    Args:
        student: what is trained.
        batch: by source, token ids [n, length] and the base's hidden states [n, length, hidden].
        settings: give the weights of the losses.
    """
    ids = torch.cat([part for part, _ in batch.values()])
    hidden, _ = student.loaded.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
    weights = objective_at(settings.config.train, 1.0).weights
    targets = {name: part[:, 1:].numel() for name, (part, _) in batch.items()}
    counts = term_counts(weights, targets, dict.fromkeys(batch, 0), targets)
    total = torch.zeros((), dtype=torch.float64)
    states = hidden.split([len(part) for part, _ in batch.values()])
    for (name, (part, teacher)), state in zip(batch.items(), states, strict=True):
        loss, _ = _sums(student, state, part, teacher, shares(weights[name], counts))
        total = total + loss
    return total


def _sums(
    student: Student, hidden: Tensor, ids: Tensor, teacher: Tensor | None, weights: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    targets = None if teacher is None else HiddenTargets(teacher[:, :-1].flatten(0, 1))
    head = student.loaded.head.detach()
    return output_losses(hidden[:, :-1].flatten(0, 1), head, ids[:, 1:].flatten(), targets, weights)


@torch.no_grad()
def evaluate(student: Student, parts: Mapping[str, Part]) -> Losses:
    """By source: cross-entropy and, where the base is known, KL(base || student) of each sequence, nats a token."""
    return {name: _of_part(student, part) for name, part in parts.items()}


def _of_part(student: Student, part: Part) -> dict[str, list[float]]:
    terms = [CROSS_ENTROPY] if part.teacher is None else [CROSS_ENTROPY, OUTPUT_KL]
    found: dict[str, list[float]] = {term: [] for term in terms}
    for start in range(0, len(part.ids), _EVALUATION_BATCH):
        ids, teacher = part.rows(np.arange(start, min(start + _EVALUATION_BATCH, len(part.ids))))
        hidden, _ = student.loaded.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
        for row in range(len(ids)):
            one = slice(row, row + 1)
            own = None if teacher is None else teacher[one]
            _, sums = _sums(student, hidden[one], ids[one], own, dict.fromkeys(terms, 1.0))
            for term in terms:
                found[term].append(float(sums[term]) / (ids.shape[1] - 1))
    return found


def objective(losses: Losses, settings: Settings) -> float:
    """The training objective on sequences that were measured, nats a token."""
    weights = objective_at(settings.config.train, 1.0).weights
    total = 0.0
    for term in (CROSS_ENTROPY, OUTPUT_KL):
        values = [(weights[name][term], losses[name][term]) for name in weights if term in weights[name]]
        count = sum(len(of_source) for _, of_source in values)
        total += sum(weight * sum(of_source) for weight, of_source in values) / max(1, count)
    return total


def _unseen(text: Mapping[str, Part], run: Run, settings: Settings) -> dict[str, Part]:
    if not run.is_tuning:
        return load_text(settings, "heldout")
    order = orders(settings, dict(text), run.seed)
    return {name: _subset(part, order[name].held_out()) for name, part in text.items()}


def _subset(part: Part, rows: NDArray[np.int64]) -> Part:
    return Part(part.ids[rows], None if part.teacher is None else np.array(part.teacher[rows]))
