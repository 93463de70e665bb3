"""Identity of what turns text into token ids: the tokenizer with its merges and rules, and the chat template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SET_BY_CALLS = ("truncation", "padding")  # state of the last call, no part of the tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of vocabulary, rules and chat template: the same digest means the same ids for the same text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "rules": {name: value for name, value in rules.items() if name not in _SET_BY_CALLS},
        "template": tokenizer.chat_template,
        "end": tokenizer.eos_token_id,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_files(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a model directory that decides tokenisation; cheap, for deciding what to do again."""
    present = [directory / name for name in _FILES if (directory / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in present}
