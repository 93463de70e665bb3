"""POST /v1/chat/completions, without Ray: OpenAI's shapes, limits and errors."""

import json
import math

import pytest
from asking import BODY, HELLO, chat, direct, error_of, events, spoken

from nexus_ray.generation.request import SamplingParams
from serve.schemas.chat import ChatRequest


@pytest.mark.parametrize("model", ["base", "bard"])
def test_a_completion(client, assistant, model):
    answer = chat(client, model=model).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == model
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == direct(assistant, model, max_tokens=12, temperature=0)
    assert choice["finish_reason"] == "length"
    prompt = len(assistant.chat_prompt(HELLO, "base", SamplingParams()).request.ids)
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_a_stream_joins_to_the_completion(client):
    whole = chat(client).json()
    chunks = events(chat(client, stream=True))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == whole["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(choices) > 6


def test_a_stream_counts_tokens_when_asked(client):
    *chunks, last = events(chat(client, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == chat(client).json()["usage"]
    assert not any("usage" in chunk for chunk in chunks)


def test_reasoning_is_kept_apart(client, assistant, monkeypatch):
    written = (
        "<|channel|>analysis<|message|>hm 🎭<|end|><|start|>assistant<|channel|>final<|message|>Aye, né.<|return|>"
    )
    spoken(assistant, monkeypatch, written)
    message = chat(client, max_tokens=40).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm 🎭", "Aye, né.")
    deltas = [chunk["choices"][0]["delta"] for chunk in events(chat(client, stream=True, max_tokens=40))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm 🎭"
    assert "".join(delta.get("content", "") for delta in deltas) == "Aye, né."


def test_sampling_parameters_reach_the_engine(client, assistant):
    full = direct(assistant, max_tokens=12, temperature=0)
    stopped = chat(client, stop=full[4:6]).json()["choices"][0]
    assert stopped["message"]["content"] == full[: full.index(full[4:6])]
    assert stopped["finish_reason"] == "stop"
    sampled = [chat(client, temperature=1, seed=seed).json()["choices"][0]["message"]["content"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert chat(client, temperature=1, top_p=0).json()["choices"][0]["message"]["content"] == full
    assert chat(client, max_tokens=None, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3
    assert chat(client, max_tokens=5, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "Good morrow, "}, {"type": "text", "text": "who goes there?"}]
    joined = chat(client, messages=[{"role": "user", "content": parts}]).json()
    assert joined["choices"] == chat(client).json()["choices"]


@pytest.mark.parametrize(
    "fields",
    [{"user": "me"}, {"n": 1}, {"tools": []}, {"logit_bias": None}, {"presence_penalty": 0.0}, {"store": True}],
)
def test_what_asks_for_nothing_is_ignored(client, fields):
    assert chat(client, **fields).json()["choices"] == chat(client).json()["choices"]


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"n": 0}, "n", "n:"),
        ({"n": 17}, "n", "n:"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, None, "response_format:"),
        ({"max_token": 3}, "max_token", "unrecognised request argument: max_token"),
        ({"temperature": 2.5}, "temperature", "temperature"),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"top_p": -0.1}, "top_p", "top_p"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"max_tokens": 401}, "max_tokens", "at most 400"),
        ({"stop": ["a"] * 33}, None, "stop"),
        ({"stop": [""]}, None, "stop"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, None, "no call"),
        ({"logit_bias": {"1": 2}}, None, "logit_bias"),
        ({"seed": 2**64}, "seed", "seed"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": "hello"}, "messages", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is required"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, None, "only the first message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "type 'text'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "unpaired surrogate"),
        ({"\ud800": 1}, None, "unicode"),
    ],
)
def test_bad_requests_are_refused(client, changes, param, says):
    response = client.post(
        "/v1/chat/completions", content=json.dumps(BODY | changes), headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    if param:
        assert error["param"] == param


@pytest.mark.parametrize("body", ["{", "", "null", "[]", '"x"', '{"temperature": NaN}', "[" * 5000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/perplexity"])
def test_bodies_that_are_not_requests_are_refused(client, path, body):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/perplexity"])
def test_an_unknown_model_is_not_found(client, path):
    body = {"model": "gpt-5", "messages": HELLO} if "chat" in path else {"model": "gpt-5", "text": "x"}
    for response in (client.post(path, json=body), client.get("/v1/models/gpt-5")):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found"
        assert "'base', 'bard'" in error["message"]


def test_unknown_paths_and_methods(client):
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "not_found"
    refused = client.get("/v1/chat/completions")
    assert error_of(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["allow"] == "POST"


def test_a_context_that_is_too_short(client, assistant):
    long = [{"role": "user", "content": "word " * assistant.engine.context_length}]
    error = error_of(chat(client, messages=long, stream=True), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(assistant.engine.context_length) in error["message"]


def test_a_full_queue_answers_429_and_recovers(client, assistant):
    running = [assistant.generate(HELLO, "base", SamplingParams(400, 0)) for _ in range(8)]
    response = chat(client)
    error = error_of(response, 429)
    assert error["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "1"
    for generation in running:
        generation.cancel()
        list(generation)
    assert chat(client).status_code == 200


def test_choices_that_do_not_fit_the_queue_together_are_refused_together(client, assistant):
    assert "9 prompts times choices are asked for, but at most 8" in error_of(chat(client, n=9), 400)["message"]
    assert assistant.engine.state().running == 0


def test_a_failing_engine_is_a_500_and_its_insides_stay_hidden(client, assistant, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(assistant.engine.base.model.model, "forward", broken)
        error = error_of(chat(client), 500)
        failed = events(chat(client, stream=True))[-1]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert failed["error"]["code"] == "internal_error"
    assert "secret" not in str(failed)
    assert chat(client).status_code == 200


def test_several_choices_differ_and_count_the_prompt_once(client):
    answer = chat(client, n=3, temperature=1, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    contents = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(contents)) == 3
    one = chat(client, temperature=1, seed=5).json()
    assert contents[0] == one["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    streamed = ["", "", ""]
    for chunk in events(chat(client, n=3, temperature=1, seed=5, stream=True)):
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == contents


def test_logprobs_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=3).json()["choices"][0]
    tokens = answer["logprobs"]["content"]
    assert (
        bytes(byte for token in tokens for byte in token["bytes"]).decode(errors="replace")
        == answer["message"]["content"]
    )
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["token"] == token["token"]  # greedy
        assert sum(math.exp(top["logprob"]) for top in token["top_logprobs"]) <= 1
    chunks = events(chat(client, logprobs=True, top_logprobs=3, stream=True))
    streamed = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert [token["token"] for token in streamed] == [token["token"] for token in tokens]
    assert chat(client).json()["choices"][0]["logprobs"] is None


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_tools_reach_the_prompt_through_the_template(client, assistant):
    plain, with_tool = chat(client).json()["usage"], chat(client, tools=[WEATHER]).json()["usage"]
    assert with_tool["prompt_tokens"] > plain["prompt_tokens"] + 20
    rendered = assistant.codec.decode(assistant.codec.encode_chat(HELLO, [WEATHER]))
    assert "get_weather = (_: {" in rendered
    assert chat(client, tools=[WEATHER], tool_choice="none").json()["usage"] == plain


@pytest.mark.parametrize(
    "written",
    [
        "<|channel|>analysis<|message|>rain?<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
    ],
)
def test_a_call_of_a_function(client, assistant, monkeypatch, written):
    spoken(assistant, monkeypatch, written)
    choice = chat(client, tools=[WEATHER], max_tokens=80).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    chunks = events(chat(client, tools=[WEATHER], max_tokens=80, stream=True))
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "get_weather"
    assert calls[0]["id"].startswith("call_")
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Rome"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_results_of_calls_go_back_to_the_model(client, assistant):
    def call(number, city):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        return {"id": f"call_{number}", "type": "function", "function": function}

    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call(1, "Rome"), call(2, "Verona")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
    ]
    assert chat(client, messages=messages, tools=[WEATHER]).status_code == 200
    conversation = ChatRequest.model_validate(BODY | {"messages": messages}).conversation()
    rendered = assistant.codec.decode(assistant.codec.encode_chat(conversation, [WEATHER]))
    for city, weather in (("Rome", "rain"), ("Verona", "sun")):
        assert f'to=functions.get_weather<|channel|>commentary json<|message|>{{"city": "{city}"}}<|call|>' in rendered
        assert f'to=assistant<|channel|>commentary<|message|>"{weather}"<|end|>' in rendered
    assert rendered.index("Rome") < rendered.index('"rain"') < rendered.index("Verona") < rendered.index('"sun"')


def test_the_effort_of_reasoning_reaches_the_prompt(client, assistant):
    rendered = assistant.codec.decode(assistant.codec.encode_chat(HELLO, None, "high"))
    assert "Reasoning: high" in rendered
    assert chat(client, reasoning_effort="high").status_code == 200
    error_of(chat(client, reasoning_effort="enormous"), 400)


def test_a_template_that_fails_on_a_schema_says_why(client):
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}
    error = error_of(chat(client, tools=[broken]), 400)
    assert "the chat template refuses" in error["message"]
