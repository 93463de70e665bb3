"""What target set is to be made: its header, which text gets which targets, and whether model and settings fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import Config, DataSection, ModelSection
from nexus_ray.data.packing import separator_id
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import ConfigError, ModelError
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import load_tokenizer
from nexus_ray.storage import Place
from nexus_ray.targets.configured import output_encoding, router_encoding, sources_with
from nexus_ray.targets.format import Header
from nexus_ray.targets.writing.shard_file import column_bytes

_TEXT_BATCH_SEQUENCES = 64
_SAME_FILES = "give all nodes of the cluster the same model, and leave it alone while targets are made"
_MOST_BYTES_OF_A_VALUE = (1 << 31) - 1  # of Arrow's binary columns


@dataclass(frozen=True)
class PrecomputeJob:
    """One target set to make.

    Attributes:
        data: text sources and sequence length.
        names: the sources to pack, in order.
        tokenizer: directory of the tokenizer.
        header: what every shard says of itself.
        teacher: the base model; None packs the text only.
        output_sources: sources whose rows get next-token targets.
        router_sources: sources whose rows get router targets.
        batch_sequences: sequences of one forward pass.
        max_tokens: wanted of each source, in whole shards; None takes all of its text.
        seed: of draws.
    """

    data: DataSection
    names: tuple[str, ...]
    tokenizer: Place
    header: Header
    teacher: ModelSection | None = None
    output_sources: frozenset[str] = frozenset()
    router_sources: frozenset[str] = frozenset()
    batch_sequences: int = _TEXT_BATCH_SEQUENCES
    max_tokens: int | None = None
    seed: int = 0

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that a worker found at the same path but that is another one.

        Raises:
            ModelError: it is.
        """
        if tokenizer_digest(tokenizer) != self.header.tokenizer_sha256:
            raise ModelError(f"the tokenizer in {self.tokenizer} is another one for this worker", _SAME_FILES)


def job_of_run(config: Config) -> PrecomputeJob:
    """The target set of a run: stored targets for offline training, sequences only for online training.

    Raises:
        ConfigError: a setting does not fit the model.
        ModelError: the base model is missing or damaged.
    """
    model = read_model_config(config.model.path)
    dimensions = family_of(model).dimensions(model)
    _check_length(config, model)
    output, router = sources_with(config, "needs_output"), sources_with(config, "router_kl")
    tokenizer = load_tokenizer(config.model.path, model)
    sizes = {"vocabulary": model["vocab_size"], "hidden_size": dimensions.hidden_size}
    header = Header(
        base_fingerprint=fingerprint(config.model.path),
        compute=config.for_stage("precompute").compute if output | router else None,
        tokenizer_sha256=tokenizer_digest(tokenizer),
        vocabulary=model["vocab_size"],
        sequence_length=config.data.sequence_length,
        separator=separator_id(tokenizer),
        output=output_encoding(config, **sizes) if output else None,
        router=router_encoding(config, dimensions) if router else None,
    )
    _check_rows(header)
    job = PrecomputeJob(
        config.data, tuple(config.train.sources), config.model.path, header, max_tokens=config.targets.max_tokens
    )
    if not output | router:
        return job
    return replace(
        job,
        teacher=config.model,
        output_sources=output,
        router_sources=router,
        batch_sequences=config.targets.batch_sequences,
        seed=config.run.seed,
    )


def job_of_text(data: DataSection, tokenizer_directory: Path) -> PrecomputeJob:
    """Packed text of all sources, for a model that is yet to be trained."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer_directory)
    header = Header(
        base_fingerprint=None,
        compute=None,
        tokenizer_sha256=tokenizer_digest(tokenizer),
        vocabulary=len(tokenizer),
        sequence_length=data.sequence_length,
        separator=separator_id(tokenizer),
        output=None,
        router=None,
    )
    return PrecomputeJob(data, tuple(data.sources), tokenizer_directory, header)


def _check_length(config: Config, model: dict[str, Any]) -> None:
    length, most = config.data.sequence_length, model.get("max_position_embeddings")
    if isinstance(most, int) and length > most:
        raise ConfigError(
            f"data.sequence_length={length} is longer than the model allows: its max_position_embeddings is {most}",
            f"set data.sequence_length={most} or less",
        )


def _check_rows(header: Header) -> None:
    """Refuse sequences whose targets do not fit into one value of a Parquet column."""
    sizes = column_bytes(header, output=header.output is not None, router=header.router is not None)
    name, most = max(sizes.items(), key=lambda item: item[1])
    if most > _MOST_BYTES_OF_A_VALUE:
        raise ConfigError(
            f"data.sequence_length={header.sequence_length} gives {most:,} bytes of {name} a sequence, "
            f"a shard holds at most {_MOST_BYTES_OF_A_VALUE:,}",
            "lower data.sequence_length, or choose a smaller targets.mode",
        )
