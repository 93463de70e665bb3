"""Requests that the service tests send, and what they expect of every answer."""

import json

from nexus_ray.generation.request import SamplingParams

HELLO = [{"role": "user", "content": "Good morrow, who goes there?"}]
BODY = {"model": "bard", "messages": HELLO, "max_tokens": 12, "temperature": 0}


def chat(client, **changes):
    return client.post("/v1/chat/completions", json=BODY | changes)


def direct(assistant, model="bard", **params):
    """What the engine says without HTTP."""
    return "".join(piece.text for piece in assistant.generate(HELLO, model, SamplingParams(**params)))


def error_of(response, status):
    """The error object of an answer, after a look at its shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


def events(response):
    """The objects of a stream, after a look at its form."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def spoken(assistant, monkeypatch, written):
    """Let the engine answer with these tokens, special ones spelled out, whatever it is asked."""
    codec = assistant.codec
    tokens = codec._tokenizer.encode(written, add_special_tokens=False)
    draws = {}

    def choose(draw, logits):
        place = draws.setdefault(id(draw), [draw, -1])
        place[1] += 1
        return tokens[place[1]] if place[1] < len(tokens) else tokens[-1]

    monkeypatch.setattr("nexus_ray.generation.batching.sampling.Draw.choose", choose)
