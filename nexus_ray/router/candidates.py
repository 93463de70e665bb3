"""Candidates for calibration text: the beginnings of shards, tokenised in parallel and divided in two halves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.cluster import map_over_pool
from nexus_ray.config import Config
from nexus_ray.data.packing import Batch, pack_shard
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import DataError
from nexus_ray.modeling.loading import load_tokenizer
from nexus_ray.router.moments import HALVES

SEQUENCE_FIELDS = ("input_ids", "num_tokens", "half", "shard", "position")


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """Packed sequences of one source, in the order of the text.

    Attributes:
        input_ids: [sequences, length] int32, padded at the end.
        num_tokens: [sequences] int32 tokens before the padding.
        half: [sequences] int32, 0 or 1.
        shard: [sequences] int32 number of the shard that each comes from.
        position: [sequences] int32 number of the sequence in its shard.
    """

    input_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    half: NDArray[np.int32]
    shard: NDArray[np.int32]
    position: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def take(self, chosen: slice | NDArray[np.int64]) -> Self:
        """Some of the sequences."""
        return type(self)(**{name: getattr(self, name)[chosen] for name in SEQUENCE_FIELDS})

    def batch(self) -> Batch:
        """All sequences side by side."""
        return Batch(self.input_ids, self.num_tokens)

    def places(self, shards: Mapping[int, str]) -> list[str]:
        """Where each sequence comes from, for messages."""
        pairs = zip(self.shard, self.position, strict=True)
        return [f"{position} of {shards[int(shard)]}" for shard, position in pairs]


@dataclass(frozen=True)
class CandidateWork:
    """The first sequences of a shard, as candidates.

    Attributes:
        shard: the shard.
        sequences: how many of its sequences, from its start, at most.
    """

    shard: Shard
    sequences: int


def token_budgets(config: Config) -> dict[str, int]:
    """Calibration tokens of each source, at least one."""
    section = config.collect
    mixture = section.mixture or dict.fromkeys(config.data.sources, 1 / len(config.data.sources))
    return {name: max(1, round(section.tokens * share)) for name, share in mixture.items()}


def plan_candidates(config: Config) -> list[CandidateWork]:
    """What is tokenised to choose from: `collect.candidates` times as many sequences as will be chosen.

    Each shard gives the same number of sequences, rounded up. A source of more shards than that gives one sequence of
    each of as many shards as needed, at even distances.
    """
    shards = list_shards(config.data, "train", tuple(token_budgets(config)))
    work = []
    for name, budget in token_budgets(config).items():
        wanted = HALVES * sequences_of_half(config, budget) * config.collect.candidates
        chosen = _evenly_spaced([shard for shard in shards if shard.source == name], wanted)
        each = math.ceil(wanted / len(chosen))
        work += [CandidateWork(shard, each) for shard in chosen]
    return work


def divide_in_halves(shards: NDArray[np.int32]) -> NDArray[np.int32]:
    """The half, 0 or 1, of each candidate of a source, given the shard each one comes from, in rising order.

    Shards go to the half that has fewer sequences so far, the largest shards first.
    """
    numbers, counts = np.unique(shards, return_counts=True)
    if len(numbers) == 1:
        return (np.arange(len(shards)) >= math.ceil(len(shards) / HALVES)).astype(np.int32)
    half_of = {}
    sizes = [0] * HALVES
    for index in np.argsort(-counts, kind="stable"):
        half = sizes.index(min(sizes))
        half_of[int(numbers[index])] = half
        sizes[half] += int(counts[index])
    return np.asarray([half_of[int(number)] for number in shards], np.int32)


class CandidateReader:
    """Actor that tokenises and packs the beginning of a shard."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.model.path, read_model_config(config.model.path))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process one `CandidateWork`; arrays come back as bytes, which Ray moves without a look inside."""
        shard = Shard(**row["shard"])
        unreadable = UnreadableRows(strict=self.config.data.strict)
        packed = pack_shard(shard, self.tokenizer, self.config.data.sequence_length, unreadable.handler)
        sequences = list(islice(packed, int(row["sequences"])))
        return {
            "shard": shard.index,
            "source": shard.source,
            "input_ids": b"".join(sequence.input_ids.tobytes() for sequence in sequences),
            "num_tokens": np.asarray([sequence.num_tokens for sequence in sequences], np.int32).tobytes(),
            **unreadable.as_row(),
        }


def read_candidates(
    config: Config, work: Sequence[CandidateWork]
) -> tuple[dict[str, CalibrationText], dict[str, tuple[int, str]]]:
    """Candidates by source, in shard order, and by source how many rows could not be read and the first of them."""
    items = [{"shard": item.shard.as_row(), "sequences": item.sequences} for item in work]
    rows = map_over_pool(CandidateReader, {"config": config}, items, config.resources, "read calibration text")
    found = {int(row["shard"]): row for row in rows}
    sources, skipped = {}, {}
    unreadable = UnreadableRows(strict=config.data.strict)
    for name in token_budgets(config):
        mine = [found[item.shard.index] for item in work if item.shard.source == name]
        sources[name] = _join(mine, config.data.sequence_length)
        for row in mine:
            unreadable.add_row(name, row)
        if unreadable.total(name):
            skipped[name] = (unreadable.total(name), unreadable.first(name))
    empty = [name for name, text in sources.items() if not len(text)]
    unreadable.warn("train", empty)
    if empty:
        raise DataError(f"data.sources.{empty[0]}.train holds no text", "add text or leave the source out")
    return sources, skipped


def sequences_of_half(config: Config, budget: int) -> int:
    """Whole sequences that each half gives for a budget of tokens, rounded up."""
    return math.ceil(budget / (HALVES * config.data.sequence_length))


def _join(rows: Sequence[dict[str, Any]], length: int) -> CalibrationText:
    """The sequences that readers returned, rows in shard order."""
    num_tokens = [np.frombuffer(row["num_tokens"], np.int32) for row in rows]
    shard = np.concatenate([np.full(len(n), row["shard"], np.int32) for n, row in zip(num_tokens, rows, strict=True)])
    return CalibrationText(
        input_ids=np.concatenate([np.frombuffer(row["input_ids"], np.int32).reshape(-1, length) for row in rows]),
        num_tokens=np.concatenate(num_tokens),
        half=divide_in_halves(shard) if len(shard) else shard,
        shard=shard,
        position=np.concatenate([np.arange(len(n), dtype=np.int32) for n in num_tokens]),
    )


def _evenly_spaced(shards: list[Shard], count: int) -> list[Shard]:
    if len(shards) <= count:
        return shards
    return [shards[index * len(shards) // count] for index in range(count)]
