"""What is left of the model that a target set was made with: its tokenizer, for text, and its LM head, for logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexus_ray.checkpoints.byte_files import exists
from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.node_cache import local_description
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import ModelError, StorageError
from nexus_ray.storage import Place
from nexus_ray.targets.format import Manifest

# The second is the head of models that share it with their embeddings.
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Words:
    """Text of token ids; the ids themselves without a tokenizer.

    Attributes:
        tokenizer: of the set, or None.
        missing: why there is none.
    """

    tokenizer: PreTrainedTokenizerBase | None
    missing: str = ""

    def text(self, ids: Sequence[int]) -> str:
        """Several tokens, quoted."""
        return repr(self.tokenizer.decode(ids)) if self.tokenizer else " ".join(map(str, ids))

    def token(self, index: int) -> str:
        """One token, quoted; one that is no whole character as the tokenizer writes it."""
        if self.tokenizer is None:
            return str(index)
        text = self.tokenizer.decode([index])
        return str(self.tokenizer.convert_ids_to_tokens(index)) if "\N{REPLACEMENT CHARACTER}" in text else repr(text)


def find_words(manifest: Manifest, directory: Place) -> Words:
    """The tokenizer in `directory`, if it is the one that the set was made with."""
    missing = f"token ids, no text: there is no tokenizer at {directory} (--tokenizer DIR)"
    try:
        here = local_description(directory)
    except (ModelError, StorageError) as error:
        return Words(None, f"{missing}: {error.message}")
    if not here.is_dir():
        return Words(None, missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(here, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        return Words(None, f"token ids, no text: {directory} has no usable tokenizer: {reason}")
    if tokenizer_digest(tokenizer) != manifest.tokenizer_sha256:
        return Words(None, f"token ids, no text: the tokenizer in {directory} is not the one the set was made with")
    return Words(tokenizer)


def find_head(manifest: Manifest, directory: Place) -> Tensor | str:
    """The [vocabulary, hidden] LM head of the model in `directory`, if it is the set's base; else why there is none."""
    missing = "hidden states without logits, which need the LM head of the base model:"
    try:
        if not exists(directory / "config.json"):
            return f"{missing} there is no model at {directory}"
        if fingerprint(directory) != manifest.base_fingerprint:
            return f"{missing} the model in {directory} is another one"
        with CheckpointReader(directory) as reader:
            names = [name for name in _HEADS if name in reader]
            return reader.read(names[0]) if names else f"{missing} {directory} has none"
    except (ModelError, StorageError) as error:
        return f"{missing} {error.message}"
