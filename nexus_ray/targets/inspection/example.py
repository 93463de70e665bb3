"""One sequence of a target set, decoded: its text, and at a few places what the teacher said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_ray import storage
from nexus_ray.errors import ConfigError
from nexus_ray.modeling.head import logits_of
from nexus_ray.targets.format import Manifest
from nexus_ray.targets.inspection.words import Words, find_head, find_words
from nexus_ray.targets.reading.reader import TargetBatch, TargetSet
from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, RouterTargets, SampledTargets, TopKTargets

_PLACES = 4  # at which a sequence is shown
_LIKELY = 5  # tokens at a place
_LAYERS = 3  # whose routers are shown
_BEFORE = 16  # tokens of text before a place
_BEGINNING = 60  # tokens of a sequence's text


@dataclass(frozen=True)
class Outcome:
    """A token, or an expert, with its probability; `draws` where it was drawn."""

    name: str
    probability: float
    draws: int | None = None


@dataclass(frozen=True)
class Routing:
    """The likely experts of one layer at one position, and the probability of all others."""

    layer: int
    position: int
    experts: tuple[Outcome, ...]
    rest: float


@dataclass(frozen=True)
class Place:
    """One predicted token.

    Attributes:
        position: of the token in its sequence, from 0.
        before: text that ends right before it.
        token: itself.
        likely: what the teacher found likely there.
        rest: probability of all other tokens; None where it is not known.
        chance: probability of the token itself; None where it is not known.
        entropy: of the teacher's whole distribution in nats; None where it is not known.
        routing: at the position before the token, or the last one before that is stored.
    """

    position: int
    before: str
    token: str
    likely: tuple[Outcome, ...]
    rest: float | None
    chance: float | None
    entropy: float | None
    routing: tuple[Routing, ...]


@dataclass(frozen=True)
class Example:
    """A decoded sequence; `notes` say what could not be shown."""

    number: int
    source: str
    tokens: int
    targets: int
    beginning: str
    places: tuple[Place, ...]
    notes: tuple[str, ...]


def choose_sequence(targets: TargetSet) -> int:
    """The first sequence that holds any targets, else the first of all."""
    start = 0
    for file in targets.manifest.files:
        if file.sequences and (file.output or file.router):
            return start
        start += file.sequences
    return 0


def decode_example(targets: TargetSet, number: int, tokenizer: Path | None = None) -> Example:
    """Decode one sequence.

    Args:
        targets: the set.
        number: of the sequence.
        tokenizer: directory of its tokenizer and model; where they were when the set was made, by default.

    Raises:
        ConfigError: there is no such sequence.
        ArtefactError: it is damaged.
    """
    manifest = targets.manifest
    ends = np.cumsum([file.sequences for file in manifest.files])
    if not len(ends) or not 0 <= number < ends[-1]:
        last = ends[-1] - 1 if len(ends) else "none"
        raise ConfigError(f"--sequence: {targets.place} has no sequence {number}; the last is {last}")
    batch = targets.read(np.asarray([number]))
    directory = tokenizer or storage.place_of(manifest.tokenizer)
    words = find_words(manifest, directory)
    ids = batch.input_ids[0, : int(batch.num_tokens[0])].tolist()
    places, note = _places(batch, ids, words, manifest, directory)
    return Example(
        number=number,
        source=manifest.files[int(np.searchsorted(ends, number, side="right"))].source,
        tokens=len(ids),
        targets=int(batch.loss_mask.sum()),
        beginning=words.text(ids[:_BEGINNING]),
        places=places,
        notes=tuple(filter(None, [words.missing, note])),
    )


def _places(
    batch: TargetBatch, ids: list[int], words: Words, manifest: Manifest, directory: storage.Place
) -> tuple[tuple[Place, ...], str]:
    """A few places, and why they lack what they lack."""
    predicted = batch.loss_mask[0].nonzero()[:, 0]
    chosen = torch.linspace(0, len(predicted) - 1, _PLACES + 2).round().long()[1:-1].unique() if len(predicted) else []
    head = find_head(manifest, directory) if isinstance(batch.output, HiddenTargets) else ""
    places = []
    for entry in map(int, chosen):
        position = int(predicted[entry])
        said = _said(batch.output, entry, ids[position], words, head)
        routing = _routing(batch.router, position - 1, manifest) if batch.router else ()
        before = words.text(ids[max(0, position - _BEFORE) : position])
        places.append(Place(position, before, words.token(ids[position]), **said, routing=routing))
    return tuple(places), head if isinstance(head, str) else ""


def _said(output: OutputTargets | None, entry: int, following: int, words: Words, head: Tensor | str) -> dict[str, Any]:
    """Fields of a `Place` that an entry of the output targets decides."""
    if isinstance(output, SampledTargets):
        return _drawn(output.ids[entry], float(output.entropy[entry]), words)
    if isinstance(output, TopKTargets):
        return _likely(output.ids[entry], output.log_probs[entry].exp(), following, words)
    if isinstance(output, HiddenTargets) and isinstance(head, Tensor):
        chances = logits_of(output.hidden[entry : entry + 1], head)[0].softmax(-1)
        return _likely(torch.arange(len(chances)), chances, following, words)
    return {"likely": (), "rest": None, "chance": None, "entropy": None}


def _drawn(draws: Tensor, entropy: float, words: Words) -> dict[str, Any]:
    ids, counts = draws.unique(return_counts=True)
    often = counts.argsort(descending=True, stable=True)
    outcomes = (Outcome(words.token(int(ids[i])), float(counts[i] / len(draws)), int(counts[i])) for i in often)
    return {"likely": tuple(outcomes), "rest": None, "chance": None, "entropy": entropy}


def _likely(ids: Tensor, chances: Tensor, following: int, words: Words) -> dict[str, Any]:
    top = chances.topk(min(_LIKELY, len(chances)))
    outcomes = (Outcome(words.token(int(ids[i])), float(chances[i])) for i in top.indices)
    there = chances[ids == following]
    chance = float(there[0]) if len(there) else None
    return {"likely": tuple(outcomes), "rest": max(0.0, 1 - float(top.values.sum())), "chance": chance, "entropy": None}


def _routing(router: RouterTargets, position: int, manifest: Manifest) -> tuple[Routing, ...]:
    """Experts of a few layers at a position, or at the last stored one before it."""
    assert manifest.router is not None
    stored = position // router.every
    shown = sorted({int(i) for i in np.linspace(0, len(router.layers) - 1, _LAYERS).round()})
    found = []
    for index in shown:
        if router.selected is not None:
            chances, ids = router.selected.log_probs[stored, index].exp(), router.selected.ids[stored, index]
        else:
            assert router.logits is not None
            everything = router.logits[stored, index].softmax(-1)
            chances, ids = everything.topk(manifest.router.experts_per_token)
        order = chances.argsort(descending=True)
        experts = tuple(Outcome(str(int(ids[i])), float(chances[i])) for i in order)
        rest = max(0.0, 1 - float(chances.sum()))
        found.append(Routing(router.layers[index], stored * router.every, experts, rest))
    return tuple(found)
