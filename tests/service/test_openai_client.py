"""The unmodified `openai` client against the interface on a real socket."""

import json
import math

import openai
import pytest
from asking import BODY, HELLO, direct

ASKED = {"model": "bard", "messages": HELLO, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def api(live):
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(api):
    assert [model.id for model in api.models.list()] == ["base", "bard"]
    assert api.models.retrieve("bard").id == "bard"


def test_a_chat_at_once_and_streamed(api, assistant):
    whole = api.chat.completions.create(**ASKED)
    assert whole.choices[0].message.content == direct(assistant, max_tokens=12, temperature=0)
    assert whole.usage.completion_tokens == 12
    stream = api.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_client_s_own_reading_of_a_stream(api, assistant):
    full = direct(assistant, max_tokens=12, temperature=0)
    with api.chat.completions.stream(**ASKED, stop=full[6:8]) as stream:
        stream.until_done()
    [choice] = stream.get_final_completion().choices
    assert (choice.message.content, choice.finish_reason) == (full[: full.index(full[6:8])], "stop")


def test_logprobs_and_several_choices(api):
    answer = api.chat.completions.create(**ASKED | {"temperature": 1}, n=2, seed=3, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        for token in choice.logprobs.content:
            assert math.exp(token.logprob) <= 1
            assert len(token.top_logprobs) == 2


def test_tools_travel_both_ways(api):
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps({"city": "Rome"})},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    asked = ASKED | {"messages": messages}
    answer = api.chat.completions.create(**asked, tools=[{"type": "function", "function": function}])
    assert answer.choices[0].message.content


def test_completions(api):
    whole = api.completions.create(model="base", prompt="thou art", max_tokens=8, temperature=0, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("thou art")
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.total_tokens
    stream = api.completions.create(model="base", prompt="thou art", max_tokens=8, temperature=0, stream=True)
    assert "thou art" + "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    several = api.completions.create(model="base", prompt=[[300, 301], [302]], max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1]


def test_errors_are_the_client_s_own(api):
    with pytest.raises(openai.NotFoundError, match="'base', 'bard'") as found:
        api.chat.completions.create(**ASKED | {"model": "gpt-5"})
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as found:
        api.chat.completions.create(**ASKED | {"temperature": 9})
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        api.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": "word " * 5000}]})
    assert found.value.code == "context_length_exceeded"


def test_a_stream_that_is_closed_early_ends_the_work(api, assistant):
    stream = api.chat.completions.create(**BODY | {"max_tokens": 400}, stream=True)
    next(iter(stream))
    stream.close()
    assert api.chat.completions.create(**ASKED).choices
    assert assistant.engine.state().running == 0
