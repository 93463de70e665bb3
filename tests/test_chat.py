"""The terminal chat, its input a pipe."""

import io
import json
import sys

import pytest

from nexus_ray.chat import chat, printable
from nexus_ray.data.documents import read_documents
from nexus_ray.data.sources import Shard
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.generation.assistant import Assistant


@pytest.fixture
def config(micro_config, micro_overlay, tmp_path):
    """A run whose overlay is the random one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "overlay").symlink_to(micro_overlay)
    return micro_config(tmp_path / "run", **{"serve.max_new_tokens": 6})


@pytest.fixture
def params_asked():
    """The sampling parameters that the engine is asked with."""
    return []


@pytest.fixture
def asked(monkeypatch, params_asked):
    """What the engine is asked: (messages, which)."""
    asked, generate = [], Assistant.generate

    def spy(self, messages, which, params):
        asked.append(([dict(message) for message in messages], which))
        params_asked.append(params)
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


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The working directory is an empty one."""
    monkeypatch.chdir(tmp_path)


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


def test_further_overlays_are_models_by_name(monkeypatch, capsys, config, micro_overlay, asked):
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"overlays": {"will": micro_overlay}})})
    monkeypatch.setattr(sys, "stdin", io.StringIO("/model will\nhello\n"))
    chat(config)
    assert [which for _, which in asked] == ["will"]
    assert capsys.readouterr().out.startswith("will: ")


def test_the_base_needs_no_overlay_but_the_student_does(talk, config, asked):
    (config.run.directory / "overlay").unlink()
    shown, notes = talk("hello", "/student", "hello", which="base")
    assert "base: " in shown
    assert "there is no model 'student'" in notes
    with pytest.raises(ArtefactError, match="nexus-ray run CONFIG"):
        talk("hello")


def test_an_unknown_speaker_is_refused(config):
    with pytest.raises(ConfigError, match="nobody is called 'teacher'"):
        chat(config, "teacher")


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\tc\nd\x07é\u200d🎭\x9b") == "a[2Jb\tc\ndé\u200d🎭"


def test_a_model_is_chosen_by_name_and_the_students_is_the_services(talk, asked):
    _, notes = talk("/model base", "one", "/model run", "two", "/model both", "three", "/model student", "four")
    assert [which for _, which in asked] == ["base", "student", "base", "student", "student"]
    assert notes.count("now answering: student") == 2


def test_temperature_and_length_hold_from_then_on(talk, asked, params_asked):
    talk("one", "/temp 0", "/max 3", "two", "/temp 1.5", "three")
    assert [(each.temperature, each.max_tokens) for each in params_asked] == [(1.0, None), (0.0, 3), (1.5, 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/model teacher", "nobody is called 'teacher'"),
        ("/model", "/model needs a name"),
        ("/temp hot", "a number from 0 to 2, found 'hot'"),
        ("/temp -1", "found '-1'"),
        ("/temp nan", "found 'nan'"),
        ("/temp 2.1", "found '2.1'"),
        ("/max 0", "whole number of tokens from 1 up, found '0'"),
        ("/max many", "found 'many'"),
        ("/max 1.5", "found '1.5'"),
        ("/save", "/save needs a file"),
        ("/save talk.jsonl", "nothing was said yet"),
        ("/quit now", "/quit takes nothing after it, found 'now'"),
        ("/both models", "/both takes nothing after it"),
        ("/Model base", "unknown command /Model"),
    ],
)
def test_what_is_not_understood_is_said_and_changes_nothing(
    line, message, talk, asked, params_asked, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    _, notes = talk(line, "one")
    assert message in notes
    assert [which for _, which in asked] == ["student"]
    assert (params_asked[0].temperature, params_asked[0].max_tokens) == (1.0, None)
    assert not (tmp_path / "talk.jsonl").exists()


def test_a_saved_conversation_is_chat_data_as_each_model_remembers_it(talk, asked, monkeypatch, tmp_path):
    monkeypatch.setattr("nexus_ray.chat.Session._show", lambda self, generation: f"ans\u2028wer {len(asked)}")
    path = tmp_path / "talk.jsonl"
    _, notes = talk("one \u00e9", "/both", "two", f"/save {path}")
    assert "2 lines" in notes
    shard = Shard(0, "play", str(path), 0, path.stat().st_size)
    base, student = (list(document.messages) for document in read_documents(shard))
    assert [message["content"] for message in base] == ["one \u00e9", "ans\u2028wer 1", "two", "ans\u2028wer 2"]
    assert [message["content"] for message in student] == ["one \u00e9", "ans\u2028wer 1", "two", "ans\u2028wer 3"]
    assert [message["role"] for message in student] == ["user", "assistant"] * 2


def test_only_models_that_answered_are_saved(talk, asked, tmp_path):
    talk("one", f"/save {tmp_path}/talk.jsonl")
    [line] = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(line)["model"] == "student"


def test_a_file_is_never_written_over_nor_through_a_link(talk, tmp_path):
    taken, link = tmp_path / "taken.jsonl", tmp_path / "link.jsonl"
    taken.write_text("precious")
    link.symlink_to(tmp_path / "target.jsonl")
    _, notes = talk("one", f"/save {taken}", f"/save {link}", f"/save {tmp_path}/no/where.jsonl", "two")
    assert taken.read_text() == "precious"
    assert not (tmp_path / "target.jsonl").exists()
    assert notes.count("exists and is not overwritten") == 2
    assert "cannot be written" in notes


def test_an_answer_that_cannot_fit_says_how_to_ask_for_less(talk, asked):
    _, notes = talk("/max 100000", "one", "/max 2", "one")
    assert "/max N asks for shorter answers" in notes
    assert [len(messages) for messages, _ in asked] == [1, 1]
