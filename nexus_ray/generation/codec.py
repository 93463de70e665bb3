"""Between text and token ids: chats through the model's own template, plain text, and tokens back to text and bytes."""

from __future__ import annotations

import codecs
import copy
import functools
import threading
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nexus_ray.data.encoding import encode_document, encode_messages
from nexus_ray.data.packing import separator_id, token_byte_lengths
from nexus_ray.data.row_forms import Document
from nexus_ray.generation.harmony import HarmonyTokens
from nexus_ray.modeling.loading import LoadedModel


class Codec:
    """A tokenizer for many threads.

    Args:
        tokenizer: of the model.
        end_ids: ids at which the model's own configuration ends a text.

    Attributes:
        end_ids: the same.
        separator: id of the token between documents, before the first one too.
        harmony: ids of the chat format's tokens.
        longest_token: UTF-8 bytes of the vocabulary's longest token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        # Encoding text and encoding chats set different options of one tokenizer.
        self._lock = threading.Lock()
        self._speller = copy.deepcopy(tokenizer)  # streams go on while a long text is encoded
        self.end_ids = end_ids
        self.separator = separator_id(tokenizer)
        self.harmony = HarmonyTokens.of(tokenizer, end_ids)
        self.longest_token = int(token_byte_lengths(tokenizer).max())
        self.vocabulary = len(tokenizer)

    @classmethod
    def of(cls, loaded: LoadedModel) -> Codec:
        """The codec of a loaded model."""
        config = loaded.model.generation_config
        ids = config.eos_token_id if config is not None else None
        ids = loaded.tokenizer.eos_token_id if ids is None else ids
        return cls(loaded.tokenizer, frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids))

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        reasoning_effort: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ending with the header of the assistant's next turn.

        Raises:
            DataError: the chat template refuses the messages or tools.
            ModelError: there is no template.
        """
        with self._lock:
            return encode_messages(
                self._tokenizer,
                list(messages),
                tools=list(tools) if tools else None,
                prompt=True,
                reasoning_effort=reasoning_effort,
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; what looks like a special token stays text."""
        with self._lock:
            return encode_document(self._tokenizer, Document(text=text))

    def offsets(self, ids: Sequence[int], *, generated: bool = False) -> list[int]:
        """Character of their joint text at which each token begins, or in the middle of which; last, where it ends.

        Args:
            ids: the tokens.
            generated: special tokens are no text.
        """
        decoder, starts, place = codecs.getincrementaldecoder("utf-8")("replace"), [0], 0
        for id_ in ids:
            if not (generated and id_ in self.harmony.special):
                place += len(decoder.decode(self.token_bytes(id_)))
            starts.append(place)
        return starts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._speller.decode(list(ids), clean_up_tokenization_spaces=False))

    @functools.lru_cache(maxsize=65_536)  # noqa: B019 (a codec lives as long as its service)
    def token_bytes(self, id_: int) -> bytes:
        """UTF-8 bytes that a token stands for; of a special token, its name. They may be part of a character."""
        token = str(self._speller.convert_ids_to_tokens(id_))
        if id_ in self.harmony.special:
            return token.encode()
        alphabet = _byte_of_character()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return self.decode([id_]).encode()

    def token_text(self, id_: int) -> str:
        """A token as text; bytes that are no whole characters are spelled out: `bytes:\\xf0\\x9f`."""
        raw = self.token_bytes(id_)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: the byte that each of its characters stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
