"""Chat in the terminal with base, student or both, in this process.

Answers go to standard output, everything else to standard error, and questions come from standard input, one a
line: a terminal, a file and a pipe all work.
"""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from nexus_ray.config import Config
from nexus_ray.console import console as notes
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.generation.assistant import Assistant, Generation
from nexus_ray.generation.request import SamplingParams
from nexus_ray.generation.serving import load_assistant
from nexus_ray.layout import RunLayout

_SPEAKERS: dict[str, tuple[str, ...]] = {"student": ("student",), "base": ("base",), "both": ("base", "student")}
_HELP = """/student, /base, /both   who answers from now on
/reset                   forget the conversation
/help                    this list
/quit                    leave (or Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


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


class Session:
    """A conversation: who answers, and what was said.

    Args:
        engine: answers.
        speakers: the models that answer, in order.
        output: where answers are written.
    """

    def __init__(self, engine: Assistant, speakers: tuple[str, ...], output: Console) -> None:
        self.speakers = speakers
        self.turns: list[Turn] = []
        self._engine = engine
        self._output = output

    def handle(self, line: str) -> bool:
        """Answer a question or obey a command; false ends the conversation."""
        command = line.strip()
        if not command:
            return True
        if not command.startswith("/"):
            self._ask(line)
        elif command[1:] in _SPEAKERS:
            self.speakers = _SPEAKERS[command[1:]]
            notes.print(f"now answering: {' and '.join(self.speakers)}", style="dim")
        elif command == "/reset":
            self.turns.clear()
            notes.print("the conversation is forgotten", style="dim")
        elif command == "/quit":
            return False
        else:
            notes.print(_HELP if command == "/help" else f"unknown command {command}\n{_HELP}", markup=False)
        return True

    def _ask(self, question: str) -> None:
        turn = Turn(question)
        try:
            for which in self.speakers:
                self._answer(turn, which)
        except NexusError as error:
            notes.print(f"{error.message}; /reset starts a new conversation", style="red", markup=False)
        if turn.answers:
            self.turns.append(turn)

    def _answer(self, turn: Turn, which: str) -> None:
        messages = [message for past in self.turns for message in past.messages(which)]
        messages.append({"role": "user", "content": turn.question})
        generation = self._engine.generate(messages, which, SamplingParams())
        self._output.print(f"{which}: ", style="bold", end="")
        turn.answers[which] = self._show(generation)
        self._output.print()

    def _show(self, generation: Generation) -> str:
        """Print an answer as it comes and return its content; Ctrl-C cuts it."""
        content = ""
        try:
            for piece in generation:
                style = "dim" if piece.channel == "reasoning" else ""
                self._output.print(Text(printable(piece.text), style), end="", soft_wrap=True)
                if piece.channel == "content":
                    content += piece.text
        except KeyboardInterrupt:
            generation.cancel()
            notes.print(" (stopped)", style="dim", end="")
        return content


def chat(config: Config, which: str = "student") -> None:
    """Chat until /quit, Ctrl-D or Ctrl-C.

    Args:
        config: the run whose student to talk to.
        which: who answers first: student, base or both.

    Raises:
        ConfigError: `which` is none of them.
        ArtefactError: the run has no trained overlay, and the base alone was not asked for.
        ModelError: the base cannot be loaded.
    """
    if which not in _SPEAKERS:
        raise ConfigError(f"nobody is called {which!r}", f"choose one of {', '.join(_SPEAKERS)}")
    engine = _engine(config, which)
    session = Session(engine, _SPEAKERS[which], Console())
    notes.print(f"{which} at {config.model.path}; /help lists the commands", style="dim", markup=False)
    try:
        while (line := _read()) is not None and session.handle(line):
            pass
    except KeyboardInterrupt:
        notes.print()
    finally:
        engine.close()


def _engine(config: Config, which: str) -> Assistant:
    """The student's engine; a run without an overlay can still be asked for its base."""
    overlay = RunLayout(config.run.directory).overlay
    if which == "base" and not overlay.exists():
        return load_assistant(config, {})
    return load_assistant(config, {"student": overlay})


def _read() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("you: " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def printable(text: str) -> str:
    """Drop control characters: a model must not be able to steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
