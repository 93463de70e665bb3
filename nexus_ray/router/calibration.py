"""The calibration text of a run: which packed sequences of each source the routers are observed on.

Workers tokenise candidates, several times as many as are wanted; the driver chooses among them, by vocabulary coverage
unless told otherwise, and keeps the choice as `calibration.safetensors`. Statistics of the student, and conversions
that need text, use the same sequences.

Every sequence belongs to one of two halves, chosen separately (`router/halves.py`). Halves share no shard, hence no
document, unless whole shards cannot be balanced: then one shard is cut between two sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import Config
from nexus_ray.data.coverage import CalibrationSample, TokenCounts, choose_by_coverage, choose_randomly, describe_sample
from nexus_ray.data.sources import Shard, describe_files
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import ArtefactError
from nexus_ray.modeling.loading import load_tokenizer
from nexus_ray.router.candidates import (
    SEQUENCE_FIELDS,
    CalibrationText,
    CandidateWork,
    plan_candidates,
    read_candidates,
    sequences_of_half,
    token_budgets,
)
from nexus_ray.router.files import REMAKE, ArrayDescription, Arrays, read_described, write_described
from nexus_ray.router.moments import HALVES
from nexus_ray.storage import Place, digest, exists

logger = logging.getLogger(__name__)
_WHAT = "calibration text"


class CalibrationDescription(ArrayDescription):
    """What `calibration.json` says.

    Attributes:
        recipe: digest of everything that decides the choice.
        samples: by source, how its sequences were chosen.
        shards: by number, the shards that sequences come from.
        unreadable: by source, how many rows of the candidates' shards could not be read, and the first of them.
    """

    format_version: int = 2
    recipe: str
    samples: dict[str, CalibrationSample]
    shards: dict[int, str]
    unreadable: dict[str, tuple[int, str]]

    def report_unreadable(self, *, strict: bool) -> None:
        """Warn of rows that could not be read, or raise DataError when `strict`."""
        rows = UnreadableRows(strict=strict)
        for name, (count, example) in self.unreadable.items():
            rows.add_row(name, {"shard": 0, "unreadable": count, "unreadable_example": example})
        rows.warn("train")


@dataclass(frozen=True)
class Calibration:
    """The calibration text of all sources."""

    description: CalibrationDescription
    sources: dict[str, CalibrationText]

    def save(self, path: Place) -> Calibration:
        """Write the file `path` and its description beside it; returns the calibration with the checksum."""
        arrays: Arrays = {
            f"{name}.{field}": getattr(text, field) for name, text in self.sources.items() for field in SEQUENCE_FIELDS
        }
        return Calibration(write_described(path, arrays, self.description), self.sources)

    @classmethod
    def load(cls, path: Place) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtefactError: it is missing or damaged.
        """
        description, arrays = read_described(path, CalibrationDescription, _WHAT)
        try:
            sources = {
                name: CalibrationText(**{field: arrays[f"{name}.{field}"] for field in SEQUENCE_FIELDS})
                for name in description.samples
            }
        except KeyError as error:
            raise ArtefactError(f"{path} lacks {error}", REMAKE) from error
        return cls(description, sources)


def choose_calibration(config: Config, path: Place) -> Calibration:
    """Choose the calibration text and write it to `path`, or read it from there when it is what would be chosen.

    Raises:
        DataError: a source is missing, unreadable or holds no token.
        StorageError: the file system refused.
    """
    work = plan_candidates(config)
    recipe = _recipe(config, work)
    if exists(path.with_suffix(".json")):
        try:
            calibration = Calibration.load(path)
        except ArtefactError as error:
            logger.warning("%s: the calibration text is chosen again", error.message)
        else:
            if calibration.description.recipe == recipe:
                calibration.description.report_unreadable(strict=config.data.strict)
                return calibration
    candidates, unreadable = read_candidates(config, work)
    budgets = token_budgets(config)
    chosen = {name: choose_sequences(candidates[name], budgets[name], config) for name in budgets}
    sources = {name: candidates[name].take(rows) for name, (rows, _) in chosen.items()}
    samples = {name: sample for name, (_, sample) in chosen.items()}
    used = {int(number) for text in sources.values() for number in text.shard}
    shards = {item.shard.index: _place(item.shard) for item in work if item.shard.index in used}
    description = CalibrationDescription(recipe=recipe, samples=samples, shards=shards, unreadable=unreadable)
    calibration = Calibration(description, sources).save(path)
    _log(calibration)
    return calibration


def choose_sequences(
    candidates: CalibrationText, budget: int, config: Config
) -> tuple[NDArray[np.int64], CalibrationSample]:
    """Choose sequences of one source within a budget of tokens, half of it from each half of the text.

    Args:
        candidates: to choose from.
        budget: tokens; each half gets half of it in whole sequences, rounded up.
        config: gives the length of a sequence, the method and the seed.

    Returns:
        The chosen candidates in the order of the text, and what the choice is worth.
    """
    choose = choose_by_coverage if config.collect.sampling == "coverage" else choose_randomly
    tokens = [ids[:count] for ids, count in zip(candidates.input_ids, candidates.num_tokens, strict=True)]
    half_budget = sequences_of_half(config, budget) * config.data.sequence_length
    rows = []
    for half in range(HALVES):
        mine = np.flatnonzero(candidates.half == half)
        counts = TokenCounts.from_sequences([tokens[row] for row in mine])
        rows.append(mine[choose(counts, half_budget, config.run.seed)] if len(mine) else mine)
    chosen = np.sort(np.concatenate(rows))
    everything = TokenCounts.from_sequences(tokens)
    sample = describe_sample(
        everything, chosen, HALVES * half_budget, method=config.collect.sampling, seed=config.run.seed
    )
    return chosen, sample


def _place(shard: Shard) -> str:
    return f"{shard.path}, {shard.start} to {shard.stop}"


def _recipe(config: Config, work: Sequence[CandidateWork]) -> str:
    """Digest of everything that decides the choice."""
    section = config.collect
    return digest(
        {
            "tokenizer": tokenizer_digest(load_tokenizer(config.model.path, read_model_config(config.model.path))),
            "length": config.data.sequence_length,
            "budgets": token_budgets(config),
            "sampling": [section.sampling, section.candidates, config.run.seed],
            "work": [[item.shard.as_row(), item.sequences] for item in work],
            "text": describe_files(config.data, "train", tuple(token_budgets(config))),
        }
    )


def _log(calibration: Calibration) -> None:
    for name, sample in calibration.description.samples.items():
        logger.info(
            "calibration text of %s: %d of %d sequences, %s tokens, %s distinct; coverage %.2f of random choice's",
            name, sample.sequences, sample.candidates, f"{sample.tokens:,}", f"{sample.distinct_tokens:,}",
            sample.coverage / sample.random_coverage,
        )  # fmt: skip
