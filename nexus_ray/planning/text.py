"""How much text a run has, in tokens, without reading it: file sizes, and tokens a byte of a small sample."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from math import ceil

import fsspec
from tokenizers import Tokenizer

from nexus_ray.checkpoints.node_cache import local_description
from nexus_ray.config import Config
from nexus_ray.data import hub_datasets
from nexus_ray.data.documents import read_documents
from nexus_ray.data.references import is_reference
from nexus_ray.data.sources import Shard, is_on_the_hub, list_shards, text_size
from nexus_ray.errors import DataError, ModelError
from nexus_ray.storage import Place

logger = logging.getLogger(__name__)
_SAMPLE_CHARACTERS = 100_000
_SAMPLE_DOCUMENTS = 200
_USUAL_TOKENS_PER_BYTE = 0.25  # of English with a large vocabulary, where there is no tokenizer to ask


@dataclass(frozen=True)
class SourceText:
    """Training text of one source.

    Attributes:
        size: bytes of its files.
        shards: units of parallel work.
        tokens: estimate.
    """

    size: int
    shards: int
    tokens: int

    def up_to(self, wanted: int | None) -> int:
        """Tokens of as many whole shards, of one size each, as hold the wanted ones; all without a wish."""
        if wanted is None or not self.tokens:
            return self.tokens
        return min(self.tokens, ceil(wanted * self.shards / self.tokens) * self.tokens // self.shards)


def measure_text(config: Config) -> dict[str, SourceText]:
    """Size of the training text of each trained source; a source whose text is not here is left out, with a warning.

    Files of Parquet count compressed, so their tokens are a lower bound. A dataset on the hub is not downloaded.
    """
    tokenizer = _tokenizer(config.model.path)
    found = {}
    for name in config.train.sources:
        try:
            with hub_datasets.downloaded_only() if is_on_the_hub(config.data.sources[name]) else nullcontext():
                shards = list_shards(config.data, "train", (name,))
                ratio = _tokens_per_byte(shards[0], tokenizer)
                size = sum(text_size(path) for path in {shard.path for shard in shards})
        except DataError as error:
            logger.warning("%s: its targets are not planned for", error.message)
            continue
        found[name] = SourceText(size, len(shards), int(size * ratio))
    return found


def measure_heldout(config: Config) -> dict[str, int]:
    """Estimated tokens of held-out text that `evaluate` reads, by source; one whose text is not here is left out.

    From sizes of files alone.
    """
    section, found = config.evaluate, dict[str, int]()
    length = config.data.sequence_length
    for name, source in config.data.sources.items():
        if not source.heldout:
            continue
        most = None if section.max_sequences_per_source is None else section.max_sequences_per_source * length
        try:
            shards = list_shards(config.data, "heldout", (name,))
        except DataError:
            continue
        tokens = int(sum(text_size(path) for path in {shard.path for shard in shards}) * _USUAL_TOKENS_PER_BYTE)
        found[name] = tokens if most is None else min(tokens, most)
    return found


def _tokenizer(model: Place) -> Tokenizer | None:
    try:
        path = local_description(model) / "tokenizer.json"
    except ModelError:  # a remote model that is yet to come
        return None
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this class itself
        raise ModelError(f"model.path: {path} cannot be read: {error}", "download it again") from error


def _tokens_per_byte(shard: Shard, tokenizer: Tokenizer | None) -> float:
    """Tokens a byte of file, from the first documents of a shard."""
    documents = islice(read_documents(shard, lambda _: None), _SAMPLE_DOCUMENTS)
    texts = [_text(document.text, document.messages) for document in documents]
    text = "".join(texts)
    sample = text[:_SAMPLE_CHARACTERS]
    if tokenizer is None or not sample:
        return _USUAL_TOKENS_PER_BYTE
    per_text_byte = len(tokenizer.encode(sample, add_special_tokens=False).ids) / len(sample.encode())
    return per_text_byte * _share_of_text(shard, len(texts), len(text.encode()))


def _share_of_text(shard: Shard, documents: int, text_bytes: int) -> float:
    """Bytes of text a byte of file: below 1 for lines of JSON, which hold names, quotes and escapes too, and for rows
    of a dataset, which hold other fields."""
    if is_reference(shard.path):
        return text_bytes / hub_datasets.size(shard.path, range(shard.start, shard.start + documents))
    if not shard.path.endswith(".jsonl"):
        return 1.0
    with fsspec.open(shard.path, "rb") as file:
        lines = (line for line in file if line.strip())
        return text_bytes / sum(len(line) for line in islice(lines, documents))


def _text(text: str | None, messages: tuple[dict[str, object], ...] | None) -> str:
    return text if text is not None else " ".join(str(message.get("content") or "") for message in messages or ())
