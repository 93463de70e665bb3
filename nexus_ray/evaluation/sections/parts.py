"""What all sections of a report are made of: tables, figures, means, text that stays text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

# What Markdown, GitHub's dialect of it, or HTML could take for formatting.
_SHOWN_AS = {mark: f"&#{ord(mark)};" for mark in "\\`*_[]()#~|$!<>&:@"} | {"\n": "<br>", "\t": " "}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown, in which a bar is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure(figures: dict[str, str], kind: str, description: str) -> list[str]:
    """The figure of a kind, where there is one."""
    return [f"![{description}]({figures[kind]})"] if kind in figures else []


def folded(summary: str, *blocks: str) -> list[str]:
    """Blocks that are shown when the summary is clicked."""
    return [f"<details><summary>{summary}</summary>", *blocks, "</details>"]


def mean(values: Sequence[float]) -> float:
    """The mean over layers."""
    return sum(values) / len(values)


def verbatim(text: str) -> str:
    """Text of a model or a document as a cell that shows it and nothing else: no formatting, no control characters."""
    kept = (letter for letter in text if letter in _SHOWN_AS or unicodedata.category(letter) != "Cc")
    return "".join(_SHOWN_AS.get(letter, letter) for letter in kept)
