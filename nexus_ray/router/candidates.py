"""Candidates for calibration text: the beginnings of shards, tokenised in parallel and divided in two halves."""

from __future__ import annotations

import logging
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
from nexus_ray.data.shard_sizes import estimate_tokens
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import DataError
from nexus_ray.modeling.loading import load_tokenizer
from nexus_ray.router.halves import divide_in_halves
from nexus_ray.router.moments import HALVES

logger = logging.getLogger(__name__)
_ENOUGH = 0.9  # of the tokens asked for
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

    A source of many shards gives one sequence of each of as many as needed, at even distances; of shards too short for
    a whole sequence, more are needed. Where all shards are, each gives sequences in proportion to its size.
    """
    shards = list_shards(config.data, "train", tuple(token_budgets(config)))
    work = []
    for name, budget in token_budgets(config).items():
        wanted = HALVES * sequences_of_half(config, budget) * config.collect.candidates
        work += _plan_source([shard for shard in shards if shard.source == name], wanted, config.data.sequence_length)
    return work


def _plan_source(shards: list[Shard], wanted: int, length: int) -> list[CandidateWork]:
    """What of one source's shards is tokenised to get `wanted` sequences of `length` tokens."""
    sequences = estimate_tokens(shards) / length
    chosen = _evenly_spaced(np.minimum(sequences, 1), wanted)
    if len(chosen) < len(shards):
        return [CandidateWork(shards[index], 1) for index in chosen]
    each = np.ceil(sequences * (wanted / sequences.sum())).astype(int)
    return [CandidateWork(shard, count) for shard, count in zip(shards, each.tolist(), strict=True)]


def _evenly_spaced(gives: NDArray[np.float64], wanted: int) -> list[int]:
    """Numbers of shards at even distances that together give what is wanted, or all of them.

    Args:
        gives: [shards] sequences that each gives, at most 1.
        wanted: sequences.
    """
    count = wanted
    while count < len(gives):
        chosen = np.arange(count) * len(gives) // count
        expected = float(gives[chosen].sum())
        if expected >= wanted:
            return chosen.tolist()
        count = max(count + 1, math.ceil(count * wanted / expected))
    return list(range(len(gives)))


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
    cpu_only = config.resources.without_gpus().model_copy(update={"memory_gib_per_worker": None})
    rows = map_over_pool(CandidateReader, {"config": config}, items, cpu_only, "read calibration text")
    found = {int(row["shard"]): row for row in rows}
    sources, skipped = {}, {}
    unreadable = UnreadableRows(strict=config.data.strict)
    for name in token_budgets(config):
        mine = [found[item.shard.index] for item in work if item.shard.source == name]
        sources[name] = _join(mine, config.data.sequence_length, _tokens_of_half(config, name))
        for row in mine:
            unreadable.add_row(name, row)
        if unreadable.total(name):
            skipped[name] = (unreadable.total(name), unreadable.first(name))
    empty = [name for name, text in sources.items() if not len(text)]
    unreadable.warn("train", empty)
    if empty:
        raise DataError(f"data.sources.{empty[0]}.train holds no text", "add text or leave the source out")
    for name, text in sources.items():
        _warn_if_short(config, name, text, [item for item in work if item.shard.source == name])
    return sources, skipped


def sequences_of_half(config: Config, budget: int) -> int:
    """Whole sequences that each half gives for a budget of tokens, rounded up."""
    return math.ceil(budget / (HALVES * config.data.sequence_length))


def _tokens_of_half(config: Config, name: str) -> int:
    """The most tokens that are chosen of each half of a source."""
    return sequences_of_half(config, token_budgets(config)[name]) * config.data.sequence_length


def _warn_if_short(config: Config, name: str, text: CalibrationText, work: Sequence[CandidateWork]) -> None:
    """Say when a source's candidates hold much less than was asked for, and what would help."""
    budget, most = token_budgets(config)[name], _tokens_of_half(config, name)
    available = sum(min(int(text.num_tokens[text.half == half].sum()), most) for half in range(HALVES))
    if available >= _ENOUGH * budget:
        return
    unread = _stops_early(text, work) or len(work) < len(list_shards(config.data, "train", (name,)))
    remedy = "raise collect.candidates to read more of it" if unread else "it has no more text"
    logger.warning(
        "data.sources.%s.train gives %s of the %s calibration tokens asked for: %s",
        name, f"{available:,}", f"{budget:,}", remedy,
    )  # fmt: skip


def _stops_early(text: CalibrationText, work: Sequence[CandidateWork]) -> bool:
    """Whether a shard gave all sequences that it was asked for, the last of them full: it may hold more."""
    asked = {item.shard.index: item.sequences for item in work}
    numbers, counts = np.unique(text.shard, return_counts=True)
    complete = counts >= np.asarray([asked[number] for number in numbers.tolist()])
    full = text.num_tokens[np.cumsum(counts) - 1] == text.input_ids.shape[1]
    return bool((complete & full).any())


def _join(rows: Sequence[dict[str, Any]], length: int, wanted: int) -> CalibrationText:
    """The sequences that readers returned, rows in shard order, in halves of which `wanted` tokens are enough."""
    num_tokens = [np.frombuffer(row["num_tokens"], np.int32) for row in rows]
    shard = np.concatenate([np.full(len(n), row["shard"], np.int32) for n, row in zip(num_tokens, rows, strict=True)])
    joined = np.concatenate(num_tokens)
    return CalibrationText(
        input_ids=np.concatenate([np.frombuffer(row["input_ids"], np.int32).reshape(-1, length) for row in rows]),
        num_tokens=joined,
        half=divide_in_halves(shard, joined, wanted),
        shard=shard,
        position=np.concatenate([np.arange(len(n), dtype=np.int32) for n in num_tokens]),
    )
