"""What was said in a chat, as each model remembers it, and as lines of JSON that a run can train on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexus_ray.errors import StorageError


@dataclass
class Turn:
    """One question and what each model that was asked said to it."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)

    def messages(self, which: str) -> list[dict[str, Any]]:
        """The turn as `which` remembers it: with its own answer, or else the other model's."""
        answer = self.answers.get(which, next(iter(self.answers.values()), None))
        asked = {"role": "user", "content": self.question}
        return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]


@dataclass
class Conversation:
    """Turns, in order."""

    turns: list[Turn] = field(default_factory=list)

    def messages(self, which: str) -> list[dict[str, Any]]:
        """The conversation as `which` remembers it."""
        return [message for turn in self.turns for message in turn.messages(which)]

    def save(self, place: str) -> int:
        """Write a new file with a line of JSON for each model that answered, in the form of chat data.

        Args:
            place: of the file; ~ stands for the home directory. Text data is known by the suffix .jsonl.

        Returns:
            How many lines it has.

        Raises:
            StorageError: nothing was said yet, the file exists, or the file system refused.
        """
        models = sorted(
            {model for turn in self.turns for model in turn.answers}, key=lambda name: (name != "base", name)
        )
        if not models:
            raise StorageError("nothing was said yet: there is nothing to save")
        rows = [{"messages": self.messages(model), "model": model} for model in models]
        try:
            # Mode x: what is there, a file or a link to one, is never written over.
            with Path(place).expanduser().open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except FileExistsError as error:
            raise StorageError(f"{place} exists and is not overwritten", "choose another name") from error
        except (OSError, RuntimeError, ValueError) as error:  # also an unknown user after ~, and a zero byte
            raise StorageError(f"{place} cannot be written: {error}", "choose another place") from error
        return len(rows)
