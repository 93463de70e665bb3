"""Every usual form of a row becomes the same conversation, and the same tokens; what fits no form is explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from nexus_ray.config import DataSection
from nexus_ray.data.documents import read_documents
from nexus_ray.data.encoding import encode_document
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.row_forms import Document, document_of
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import DataError

QUESTION, ANSWER = "Who's there?", "Nay, answer me."
ASKED = {"role": "user", "content": QUESTION}
ANSWERED = {"role": "assistant", "content": ANSWER}
SYSTEM = {"role": "system", "content": "Speak as a sentinel."}

SAME_CONVERSATION = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "messages of text parts": {"messages": [m | {"content": [{"text": m["content"]}]} for m in (ASKED, ANSWERED)]},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "sharegpt's roles": {"conversations": [{"from": m["role"], "value": m["content"]} for m in (ASKED, ANSWERED)]},
    "conversations of role and content": {"conversations": [ASKED, ANSWERED]},
    "conversation": {"conversation": [ASKED, ANSWERED]},
    "prompt and response": {"prompt": QUESTION, "response": ANSWER},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and completion of messages": {"prompt": [ASKED], "completion": [ANSWERED]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "alpaca with its rendering": {"instruction": QUESTION, "output": ANSWER, "text": "### Instruction: ..."},
    "dolly": {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "play"},
    "question and answer": {"question": QUESTION, "answer": ANSWER},
    "input and output": {"input": QUESTION, "output": ANSWER},
    "nemotron": {"version": "v1", "input": [ASKED], "output": ANSWER, "category": "chat", "reasoning": "off"},
}  # fmt: skip


@pytest.mark.parametrize("row", SAME_CONVERSATION.values(), ids=SAME_CONVERSATION)
def test_a_conversation_is_the_same_in_every_form(row: dict[str, Any]) -> None:
    assert document_of(row) == Document(messages=(ASKED, ANSWERED))


@pytest.mark.parametrize("container", ["jsonl", "parquet", "dataset"])
def test_a_conversation_gives_the_same_tokens_in_every_form_and_container(
    container: str, tokenizer_directory: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    expected = encode_document(tokenizer, Document(messages=(ASKED, ANSWERED)))
    for number, row in enumerate(SAME_CONVERSATION.values()):
        path = tmp_path / f"{number}.{container}"
        if container == "jsonl":
            path.write_text(json.dumps(row) + "\n")
        elif container == "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        else:
            Dataset.from_list([row]).save_to_disk(path)
        data = DataSection.model_validate({"sources": {"play": {"train": str(path)}}})
        [shard] = list_shards(data, "train")
        [document] = read_documents(shard)
        assert encode_document(tokenizer, document) == expected
        [sequence] = pack_shard(shard, tokenizer, 512)
        assert sequence.input_ids[1 : sequence.num_tokens - 1].tolist() == expected


def test_an_instruction_is_followed_by_what_it_is_about() -> None:
    row = {"instruction": "Translate.", "input": "Bonjour.", "output": "Good day."}
    assert document_of(row).messages == (
        {"role": "user", "content": "Translate.\n\nBonjour."},
        {"role": "assistant", "content": "Good day."},
    )


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("form", ["nemotron", "sharegpt", "prompt and response"])
def test_a_system_prompt_beside_the_conversation_comes_first(name: str, form: str) -> None:
    row = SAME_CONVERSATION[form] | {name: SYSTEM["content"]}
    assert document_of(row).messages == (SYSTEM, ASKED, ANSWERED)
    assert document_of(row | {name: ""}).messages == (ASKED, ANSWERED)


def test_a_conversation_with_its_own_system_prompt_keeps_it() -> None:
    row = {"messages": [SYSTEM, ASKED, ANSWERED], "system": "Another."}
    assert document_of(row).messages == (SYSTEM, ASKED, ANSWERED)


class TestText:
    def test_plain_text(self) -> None:
        assert document_of({"text": "Enter Ghost.", "id": 3}) == Document(text="Enter Ghost.")

    def test_a_conversation_goes_before_text(self) -> None:
        assert document_of({"text": "Enter Ghost.", "messages": [ASKED]}).messages == (ASKED,)

    def test_a_text_field_goes_before_everything_where_a_row_has_it(self) -> None:
        row = {"text": "Enter Ghost.", "body": "Mark me.", "messages": [ASKED], "prompt": "p", "response": "r"}
        assert document_of(row, "body") == Document(text="Mark me.")
        assert document_of(row, "text") == Document(text="Enter Ghost.")
        assert document_of({"messages": [ASKED]}, "body").messages == (ASKED,)

    def test_the_place_is_no_part_of_what_a_document_is(self) -> None:
        document = document_of({"text": "x"}, place="a.jsonl, byte 0")
        assert document.place == "a.jsonl, byte 0"
        assert document == Document(text="x")


CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


class TestFieldsOfMessages:
    @pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
    def test_reasoning_has_the_names_that_templates_look_for(self, name: str) -> None:
        [message] = document_of({"messages": [ANSWERED | {name: "Who could it be?"}]}).messages or ()
        assert (message["thinking"], message["reasoning_content"]) == ("Who could it be?",) * 2

    def test_tool_calls_and_answers_are_kept(self) -> None:
        called = {"role": "assistant", "tool_calls": [CALL]}
        answer = {"role": "tool", "content": {"sum": 1}, "tool_call_id": "c1"}
        assert document_of({"messages": [ASKED, called, answer]}).messages == (ASKED, called, answer)

    def test_arguments_in_a_string_of_json_are_the_object_that_it_holds(self) -> None:
        call = CALL | {"function": {"name": "add", "arguments": '{"a": 1}'}}
        [message] = document_of({"messages": [{"role": "assistant", "tool_calls": [call]}]}).messages or ()
        assert message["tool_calls"] == [CALL]

    @pytest.mark.parametrize("tools", [[{"type": "function", "function": {"name": "add"}}], '[{"name": "add"}]'])
    def test_tools_beside_the_conversation_are_kept(self, tools: Any) -> None:
        expected = tuple(json.loads(tools) if isinstance(tools, str) else tools)
        assert document_of({"messages": [ASKED], "tools": tools}).tools == expected

    def test_fields_that_a_table_fills_with_null_are_left_out(self) -> None:
        """Templates ask whether a field is there, not whether it is null."""
        empty = {"thinking": None, "tool_calls": None, "name": None}
        row = {"messages": [ASKED | empty, ANSWERED | empty | {"tool_calls": []}], "text": None, "tools": None}
        assert document_of(row) == Document(messages=(ASKED, ANSWERED))


REFUSED = {
    "fields of no form": ({"txt": "x", "label": 3}, "its fields: label, txt"),
    "text that is a number": ({"text": 3}, "its fields: text"),
    "half a pair": ({"prompt": "x"}, "its fields: prompt"),
    "nothing": ({}, "its fields: none"),
    "a list": (["x"], "the row is a list"),
    "no messages": ({"messages": []}, "no messages"),
    "a message that is text": ({"messages": ["x"]}, "messages[0]: a message must be an object"),
    "an unknown role": ({"messages": [ASKED, {"role": "narrator", "content": "x"}]}, "messages[1]: unknown role 'nar"),
    "an unknown speaker": ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0]: unknown role 'bot'"),
    "no role": ({"messages": [{"content": "x"}]}, "unknown role None"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
    "no content": ({"messages": [{"role": "user", "contents": "x"}]}, "no content; its fields: contents, role"),
    "content that is a number": ({"messages": [{"role": "user", "content": 3}]}, "must be text"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
    "an unknown role in a pair": ({"input": [{"role": "x", "content": "y"}], "output": "z"}, "input[0]: unknown role"),
    "tools that are no json": ({"messages": [ASKED], "tools": "[{"}, "'tools' is not JSON"),
    "tools that are no functions": ({"messages": [ASKED], "tools": ["add"]}, "'tools' must be a list"),
    "half a surrogate pair": ({"text": "a\ud800"}, "UTF-8"),
    "half a surrogate pair in a message": ({"messages": [{"role": "user", "content": "\udc00"}]}, "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_what_fits_no_form_is_explained(row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        document_of(row)
    assert message in caught.value.message


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


def deep_rows(levels: int) -> dict[str, dict[str, Any]]:
    """Rows of conversations in which a value of twice as many levels stands in each place where any may."""
    deep = nested(levels)
    function = {"name": "add", "arguments": json.dumps(deep)}
    return {
        "beside the content": {"messages": [ASKED | {"meta": deep}]},
        "the answer of a tool": {"messages": [ASKED, {"role": "tool", "content": deep}]},
        "a role": {"messages": [{"role": deep, "content": "x"}]},
        "arguments in a string": {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]},
        "tools": {"messages": [ASKED], "tools": [{"name": "add", "parameters": deep}]},
        "tools in a string": {"messages": [ASKED], "tools": json.dumps([deep])},
        "one side of a pair": {"prompt": [ASKED | {"meta": deep}], "response": "x"},
    }


@pytest.mark.parametrize("place", deep_rows(1))
@pytest.mark.parametrize("levels", [60, 150, 450])
def test_a_conversation_nested_too_deeply_is_one_unreadable_row(
    place: str, levels: int, tokenizer_directory: Path, tmp_path: Path
) -> None:
    path = tmp_path / "deep.jsonl"
    rows = [{"text": "before"}, deep_rows(levels)[place], {"text": "after", "meta": nested(levels)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [shard] = list_shards(DataSection.model_validate({"sources": {"play": {"train": str(path)}}}), "train")
    errors: list[DataError] = []
    [sequence] = pack_shard(shard, AutoTokenizer.from_pretrained(tokenizer_directory), 512, errors.append)
    assert sequence.num_tokens > 2
    [error] = errors
    assert "levels of fields and lists" in error.message
    assert "deep.jsonl, byte" in error.message


def test_a_schema_nested_as_deeply_as_real_ones_are_is_read() -> None:
    rows = deep_rows(20)
    del rows["a role"]
    for row in rows.values():
        assert document_of(row).messages


def test_a_row_of_no_form_names_the_field_that_was_asked_for_and_what_is_accepted() -> None:
    with pytest.raises(DataError) as caught:
        document_of({"title": "x"}, "body")
    assert "'body', which data.sources.NAME.text_field names" in caught.value.message
    for name in ("text_field", "messages", "conversations", "prompt", "instruction", "input"):
        assert name in (caught.value.hint or "")
