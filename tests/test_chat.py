"""The terminal chat, its input a pipe."""

import io
import sys

import pytest

from nexus_ray.chat import chat, printable
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.generation.assistant import Assistant


@pytest.fixture
def config(micro_config, micro_overlay, tmp_path):
    """A run whose overlay is the random one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "overlay").symlink_to(micro_overlay)
    return micro_config(tmp_path / "run", **{"serve.max_new_tokens": 6})


@pytest.fixture
def asked(monkeypatch):
    """What the engine is asked: (messages, which)."""
    asked, generate = [], Assistant.generate

    def spy(self, messages, which, params):
        asked.append(([dict(message) for message in messages], which))
        return generate(self, messages, which, params)

    monkeypatch.setattr(Assistant, "generate", spy)
    return asked


@pytest.fixture
def talk(monkeypatch, capsys, config):
    """A function from input lines to what standard output and standard error show."""

    def talk(*lines: str, which: str = "student", end: str = "\n") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + end))
        chat(config, which)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return talk


def answers(shown, who):
    return [line.removeprefix(f"{who}: ") for line in shown.splitlines() if line.startswith(f"{who}: ")]


def test_lines_of_a_pipe_are_answered_until_it_ends(talk, asked):
    shown, _ = talk("good morrow", "", "who art thou", end="")
    assert shown.count("student: ") == 2
    assert [len(messages) for messages, _ in asked] == [1, 3]
    assert "".join(asked[1][0][1]["content"].split()) in "".join(shown.split())
    assert asked[1][0][2] == {"role": "user", "content": "who art thou"}


def test_commands_switch_who_answers(talk, asked):
    shown, _ = talk("one", "/base", "two", "/both", "three", "/student", "four")
    assert [which for _, which in asked] == ["student", "base", "base", "student", "student"]
    assert shown.index("base: ") > shown.index("student: ")


def test_each_model_remembers_its_own_answers_and_else_the_others(talk, asked, monkeypatch):
    monkeypatch.setattr("nexus_ray.chat.Session._show", lambda self, generation: f"answer {len(asked)}")
    talk("one", "/both", "two", "three")
    (_, _), (base_two, _), (student_two, _), (base_three, _), (student_three, _) = asked
    assert [message["content"] for message in base_two] == ["one", "answer 1", "two"]
    assert base_two == student_two
    assert [message["content"] for message in base_three] == ["one", "answer 1", "two", "answer 2", "three"]
    assert [message["content"] for message in student_three] == ["one", "answer 1", "two", "answer 3", "three"]


def test_reset_help_quit_and_unknown_commands(talk, asked):
    shown, notes = talk("one", "/reset", "two", "/help", "/nonsense", "/quit", "never asked")
    assert [len(messages) for messages, _ in asked] == [1, 1]
    assert "/both" in notes
    assert "unknown command /nonsense" in notes
    assert "/help" not in shown


def test_a_conversation_that_no_longer_fits_says_so_and_goes_on(talk, asked, config):
    _, notes = talk("word " * 5000, "short")
    assert "/reset starts a new conversation" in notes
    assert [len(messages) for messages, _ in asked] == [1, 1]


def test_ctrl_c_at_the_prompt_leaves(talk, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    talk("ignored")


def test_ctrl_c_during_an_answer_keeps_the_conversation(talk, asked, monkeypatch):
    pieces, interrupted = Assistant.generate, []

    class Interrupted:
        def __init__(self, generation):
            self.generation = generation

        def __iter__(self):
            yield next(iter(self.generation))
            raise KeyboardInterrupt

        def cancel(self):
            interrupted.append(True)
            self.generation.cancel()

    def generate(self, messages, which, params):
        generation = pieces(self, messages, which, params)
        return generation if interrupted else Interrupted(generation)

    monkeypatch.setattr(Assistant, "generate", generate)
    _, notes = talk("one", "two")
    assert interrupted
    assert "(stopped)" in notes
    assert [len(messages) for messages, _ in asked] == [1, 3]


def test_the_base_needs_no_overlay_but_the_student_does(talk, config, asked):
    (config.run.directory / "overlay").unlink()
    shown, notes = talk("hello", "/student", "hello", which="base")
    assert "base: " in shown
    assert "there is no student" in notes
    with pytest.raises(ArtefactError, match="nexus-ray run CONFIG"):
        talk("hello")


def test_an_unknown_speaker_is_refused(config):
    with pytest.raises(ConfigError, match="nobody is called 'teacher'"):
        chat(config, "teacher")


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\tc\nd\x07é\u200d🎭\x9b") == "a[2Jb\tc\ndé\u200d🎭"
