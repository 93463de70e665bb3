"""Chat in the terminal with base, student or both, in this process.

Answers go to standard output, everything else to standard error, and questions come from standard input, one a
line: a terminal, a file and a pipe all work.
"""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from nexus_ray.chat.commands import Command, parse
from nexus_ray.chat.conversation import Conversation, Turn
from nexus_ray.config import Config
from nexus_ray.console import console as notes
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.generation.assistant import Assistant, Generation
from nexus_ray.generation.request import SamplingParams
from nexus_ray.generation.serving import load_assistant, student_name
from nexus_ray.layout import RunLayout
from nexus_ray.storage import exists

_SPEAKERS: dict[str, tuple[str, ...]] = {"student": ("student",), "base": ("base",), "both": ("base", "student")}
_HELP = """/model NAME              who answers from now on: base, or a student ({names})
/student, /base, /both   the same, shorter; /both asks one after the other
/temp X                  temperature of the answers, 0 to 2; 0 always takes the most likely token
/max N                   tokens of an answer at most
/save FILE               write the conversation as a line of JSON for each model that answered
/reset                   forget the conversation
/help                    this list
/quit                    leave (or Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


class Session:
    """A conversation: who answers and how, and what was said.

    Args:
        engine: answers.
        speakers: the models that answer, in order.
        output: where answers are written.
        student: another name of the run's student, as the service calls it.
    """

    def __init__(self, engine: Assistant, speakers: tuple[str, ...], output: Console, student: str) -> None:
        self.speakers = speakers
        self.params = SamplingParams()
        self.conversation = Conversation()
        self._engine = engine
        self._output = output
        others = {name: (name,) for name in engine.engine.models}
        self._models = {student: _SPEAKERS["student"], **others, **_SPEAKERS}

    def handle(self, line: str) -> bool:
        """Answer a question or obey a command; false ends the conversation."""
        if not line.strip():
            return True
        if not line.strip().startswith("/"):
            self._ask(line)
            return True
        try:
            command = parse(line.strip(), tuple(self._models))
            if command.name == "quit":
                return False
            _note(self._obey(command))
        except NexusError as error:
            notes.print(str(error), style="red", markup=False, soft_wrap=True)
        return True

    def _obey(self, command: Command) -> str:
        """Do what a command says; what to tell about it."""
        if command.name == "model":
            self.speakers = self._models[str(command.value)]
            return f"now answering: {' and '.join(self.speakers)}"
        if command.name == "temp":
            self.params = replace(self.params, temperature=float(command.value or 0))
            return f"temperature {self.params.temperature:g}"
        if command.name == "max":
            self.params = replace(self.params, max_tokens=int(command.value or 1))
            return f"at most {self.params.max_tokens} tokens an answer"
        if command.name == "save":
            lines = self.conversation.save(str(command.value))
            return f"{command.value}: {lines} line{'s' if lines != 1 else ''}"
        if command.name == "reset":
            self.conversation.turns.clear()
            return "the conversation is forgotten"
        return _HELP.format(names=", ".join(name for name in self._models if name not in ("base", "both")))

    def _ask(self, question: str) -> None:
        turn = Turn(question)
        try:
            for which in self.speakers:
                self._answer(turn, which)
        except NexusError as error:
            help_ = "/reset starts a new conversation, /max N asks for shorter answers"
            notes.print(f"{error.message}; {help_}", style="red", markup=False, soft_wrap=True)
        if turn.answers:
            self.conversation.turns.append(turn)

    def _answer(self, turn: Turn, which: str) -> None:
        messages = [*self.conversation.messages(which), {"role": "user", "content": turn.question}]
        generation = self._engine.generate(messages, which, self.params)
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
    name = student_name(config)
    engine = _engine(config, which)
    session = Session(engine, _SPEAKERS[which], Console(), name)
    notes.print(f"{which} at {config.model.path}; /help lists the commands", style="dim", markup=False)
    try:
        while (line := _read()) is not None and session.handle(line):
            pass
    except KeyboardInterrupt:
        notes.print()
    finally:
        engine.close()


def _engine(config: Config, which: str) -> Assistant:
    """Answers as the run's student, further ones, or the base, which can be asked without an overlay too."""
    overlay = RunLayout(config.run.directory).overlay
    if which == "base" and not exists(overlay):
        return load_assistant(config, {})
    return load_assistant(config, {**config.serve.overlays, "student": overlay})


def _read() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("you: " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _note(text: str) -> None:
    notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Drop control characters: a model must not be able to steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
