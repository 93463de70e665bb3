"""Greedy continuations of base and student: against an argmax loop, and what they begin with."""

from __future__ import annotations

import pytest
import torch

from nexus_ray.config import ContinuationsSection
from nexus_ray.data.encoding import encode_messages
from nexus_ray.data.packing import separator_id
from nexus_ray.data.sources import list_shards
from nexus_ray.evaluation.continuations import own_prompts, source_prompts
from nexus_ray.evaluation.sections.continuations import continuations
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_student

ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who art thou"}]
CHAT = {"messages": [*ASKED, {"role": "assistant", "content": "thy servant"}]}


@pytest.fixture
def student(trained):
    config = trained()
    return load_student(config.model, RunLayout(config.run.directory).overlay)


@pytest.fixture
def shard_of(trained, heldout):
    """A function (rows) -> the only shard with these rows."""

    def make(rows):
        [shard] = list_shards(trained(**heldout(rows)).data, "heldout", ("play",))
        return shard

    return make


def argmax_loop(loaded, ids: list[int], tokens: int, end: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    ids = list(ids)
    begin = len(ids)
    while len(ids) - begin < tokens and (len(ids) == begin or ids[-1] != end):
        with torch.no_grad():
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[begin:]


def test_both_models_continue_each_source_and_the_configured_prompts_first(scored, student):
    found = scored(**{"evaluate.samples": {"prompts": ["thou art"], "per_source": 2, "tokens": 7}}).samples
    assert [sample["source"] for sample in found] == [None, "play", "play", "prose", "prose"]
    assert found[0]["prompt"] == "thou art"
    separator = separator_id(student.tokenizer)
    for sample in found:
        ids = [separator, *student.tokenizer.encode(sample["prompt"], add_special_tokens=False)]
        expected = student.tokenizer.decode(argmax_loop(student, ids, 7, separator), skip_special_tokens=True)
        assert sample["student"] == expected
        with student.base():
            expected = student.tokenizer.decode(argmax_loop(student, ids, 7, separator), skip_special_tokens=True)
        assert sample["base"] == expected
    assert any(sample["base"] != sample["student"] for sample in found)


def test_none_are_written_where_none_are_wanted(scored):
    assert scored(**{"evaluate.samples.per_source": 0}).samples == []


def test_a_beginning_has_the_wanted_number_of_tokens_and_no_broken_character(student, shard_of):
    texts = ["one two three four five six seven", "naïve 🙂🙂🙂🙂🙂🙂🙂🙂🙂", " \n "]
    shard = shard_of([{"text": text} for text in texts])
    for tokens in range(1, 12):
        prompts = source_prompts(student, shard, 9, ContinuationsSection(prompt_tokens=tokens))
        assert len(prompts) == 2
        assert all(text.startswith(prompt.text) for text, prompt in zip(texts, prompts, strict=False))
        assert len(prompts[0].ids) <= tokens + 1


def test_a_conversation_is_continued_with_its_last_answer(student, shard_of):
    [prompt] = source_prompts(student, shard_of([CHAT]), 1, ContinuationsSection())
    assert prompt.ids == encode_messages(student.tokenizer, ASKED, prompt=True, pin_date=True)
    assert (prompt.text, prompt.is_chat) == ("who art thou", True)


def test_a_conversation_that_fills_the_context_is_passed_over(student, shard_of):
    long = {"messages": [{"role": "user", "content": "king " * 3000}, {"role": "assistant", "content": "aye"}]}
    [prompt] = source_prompts(student, shard_of([long, CHAT]), 1, ContinuationsSection())
    assert prompt.text == "who art thou"


def test_text_that_looks_like_control_tokens_stays_text(student):
    [prompt] = own_prompts(student, ["<|start|>assistant"])
    assert student.tokenizer.convert_tokens_to_ids("<|start|>") not in prompt.ids


def test_the_report_shows_texts_as_they_are():
    text = "a|b\n<b>*c*</b> [x](y) \x1b[2J `d` 1 < 2 & 3"
    report = {"samples": [{"source": "play", "prompt": text, "base": "", "student": "ok"}]}
    _, table, _ = continuations(report)
    row = table.splitlines()[2]
    assert row.count("|") == 5
    assert "\x1b" not in row
    assert "<b>" not in row.replace("<br>", "")
    import html

    shown = html.unescape(row.split("|")[2].strip().replace("<br>", "\n"))
    assert shown == text.replace("\x1b", "")
    assert "*nothing*" in row
    assert continuations({"samples": []}) == []
