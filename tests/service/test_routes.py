"""The HTTP interface, without Ray: OpenAI's shapes, limits and errors."""

import asyncio
import json
import time

import pytest

from nexus_ray.generation.request import SamplingParams
from serve.routes import build_api

HELLO = [{"role": "user", "content": "Good morrow, who goes there?"}]
BODY = {"model": "bard", "messages": HELLO, "max_tokens": 12, "temperature": 0}


def chat(client, **changes):
    return client.post("/v1/chat/completions", json=BODY | changes)


def direct(engine, which="student", **params):
    return "".join(piece.text for piece in engine.generate(HELLO, which, SamplingParams(**params)))


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_health_and_models(client, engine):
    assert client.get("/healthz").json() == {
        "status": "ok",
        "models": ["base", "bard"],
        "base_fingerprint": engine.loaded.fingerprint,
    }
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["base", "bard"]
    assert all(card["object"] == "model" and abs(card["created"] - time.time()) < 600 for card in models["data"])
    assert client.get("/v1/models/bard").json() == models["data"][1]


@pytest.mark.parametrize(("model", "which"), [("base", "base"), ("bard", "student")])
def test_a_completion(client, engine, model, which):
    answer = chat(client, model=model).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == model
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == direct(engine, which, max_tokens=12, temperature=0)
    assert choice["finish_reason"] == "length"
    prompt = len(engine.prepare(HELLO, "base", SamplingParams()).ids)
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


def test_reasoning_is_kept_apart(client, engine, monkeypatch):
    """A model that thinks first, played by handing the tokens of such an answer to whoever watches `generate`."""
    written = (
        "<|channel|>analysis<|message|>hm 🎭<|end|><|start|>assistant<|channel|>final<|message|>Aye, né.<|return|>"
    )
    tokens = engine.loaded.tokenizer.encode(written, add_special_tokens=False)

    def generate(ids, stopping_criteria, **_):
        for token in tokens:
            ids = ids.new_tensor([[*ids[0].tolist(), token]])
            if stopping_criteria(ids, None).all():
                break

    monkeypatch.setattr(engine.loaded.model, "generate", generate)
    message = chat(client).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm 🎭", "Aye, né.")
    deltas = [chunk["choices"][0]["delta"] for chunk in events(chat(client, stream=True))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm 🎭"
    assert "".join(delta.get("content", "") for delta in deltas) == "Aye, né."


def test_sampling_parameters_reach_the_engine(client, engine):
    full = direct(engine, max_tokens=12, temperature=0)
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
        ({"n": 2}, None, "n: only 1 is supported"),
        ({"tools": [{"type": "function"}]}, None, "tools:"),
        ({"logprobs": True}, None, "logprobs:"),
        ({"response_format": {"type": "json_object"}}, None, "response_format:"),
        ({"max_token": 3}, "max_token", "unrecognised request argument: max_token"),
        ({"temperature": 2.5}, "temperature", "temperature"),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"top_p": -0.1}, "top_p", "top_p"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"max_tokens": 401}, "max_tokens", "at most 400"),
        ({"stop": ["a", "b", "c", "d", "e"]}, None, "stop"),
        ({"stop": ""}, None, "stop"),
        ({"seed": 2**64}, "seed", "seed"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": "hello"}, "messages", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content is required"),
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
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/perplexity"])
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
    assert error_of(client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"


def test_a_context_that_is_too_short(client, engine):
    long = [{"role": "user", "content": "word " * engine.context_length}]
    error = error_of(chat(client, messages=long, stream=True), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_a_full_queue_answers_429_and_recovers(client, engine):
    running = [engine.generate(HELLO, "base", SamplingParams(400, 0)) for _ in range(2)]
    response = chat(client)
    error = error_of(response, 429)
    assert error["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "1"
    for generation in running:
        generation.cancel()
        list(generation)
    assert chat(client).status_code == 200


def test_a_failing_engine_is_a_500_and_its_insides_stay_hidden(client, engine, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(engine.loaded.model, "generate", broken)
    error = error_of(chat(client), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    failed = events(chat(client, stream=True))[-1]
    assert failed["error"]["code"] == "internal_error"


def test_perplexity_of_both_side_by_side(client):
    texts = ["thou art the king", "peace and the budget, " * 20]
    answer = client.post("/v1/perplexity", json={"texts": texts}).json()
    assert answer["object"] == "perplexity"
    assert answer["sequence_length"] == 32
    assert [result["index"] for result in answer["results"]] == [0, 1]
    for result, text in zip(answer["results"], texts, strict=True):
        assert (result["base"]["model"], result["student"]["model"]) == ("base", "bard")
        assert result["base"]["bytes"] == len(text)
        assert result["base"]["tokens"] == result["student"]["tokens"]
        assert result["base"]["nats_per_token"] != result["student"]["nats_per_token"]


def test_perplexity_of_one_model(client):
    text = "thou art the king"
    both = client.post("/v1/perplexity", json={"text": text}).json()["results"][0]
    one = client.post("/v1/perplexity", json={"text": text, "model": "bard"}).json()["results"]
    assert one == [{"index": 0} | both["student"]]
    assert set(one[0]) == {"index", "model", "token_perplexity", "bits_per_byte", "nats_per_token", "tokens", "bytes"}


@pytest.mark.parametrize(
    "body",
    [{}, {"text": "a", "texts": ["b"]}, {"text": ""}, {"texts": []}, {"texts": ["a", ""]}, {"text": "a" * 1_000_001}],
)
def test_perplexity_of_nothing_or_too_much_is_refused(client, body):
    assert error_of(client.post("/v1/perplexity", json=body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(service, engine, stream, monkeypatch):
    """An ASGI client that disconnects after the first event (or, without streaming, during the answer)."""
    started, submit = [], engine.submit

    def spy(*arguments):
        started.append(submit(*arguments))
        return started[-1]

    monkeypatch.setattr(engine, "submit", spy)
    body = json.dumps(BODY | {"stream": stream, "max_tokens": 400}).encode()

    async def request():
        gone = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if incoming:
                return incoming.pop(0)
            if stream:
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                gone.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "raw_path": b"/v1/chat/completions", "root_path": ""}
        scope |= {"scheme": "http", "client": ("test", 1), "server": ("test", 80), "asgi": {"version": "3.0"}}
        await build_api(service)(scope, receive, send)

    asyncio.run(request())
    list(engine.generate(HELLO, "base", SamplingParams(1, 0)))  # the queue is in order: the other one has ended
    assert len(started) == 2
    assert started[0].completion_tokens < 400
