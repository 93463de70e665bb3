"""The repository's held-out documents, as benchmark scripts read them."""

from __future__ import annotations

import json
from pathlib import Path

_TEXTS = Path(__file__).parents[1] / "assets" / "text"


def heldout_texts(source: str) -> list[str]:
    """Held-out documents of a source, "speeches" or "shakespeare", in their order."""
    lines = (_TEXTS / f"{source}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
