"""POST /v1/completions: texts and token ids continued, echoed and scored, in OpenAI's shapes."""

import dataclasses
import json
import math

import pytest
import torch
from asking import error_of, events

from nexus_ray.config import ModelSection
from nexus_ray.generation.request import TokenChoice
from nexus_ray.modeling.loading import load_student
from serve.logprobs import text_logprobs

BODY = {"model": "bard", "prompt": "thou art the", "max_tokens": 8, "temperature": 0}


def complete(client, **changes):
    return client.post("/v1/completions", json=BODY | changes)


def text_of(client, **changes):
    return complete(client, **changes).json()["choices"][0]["text"]


@pytest.fixture(scope="session")
def student(micro_model, micro_overlay):
    return load_student(ModelSection(path=micro_model), micro_overlay)


def reference_logprobs(student, ids):
    """log-probability of each token but the first, and for each place the whole distribution."""
    with torch.no_grad():
        log_probs = student.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [log_probs[place, id_].item() for place, id_ in enumerate(ids[1:])], log_probs


def test_a_completion(client, assistant, student):
    answer = complete(client).json()
    assert (answer["object"], answer["model"]) == ("text_completion", "bard")
    assert answer["id"].startswith("cmpl-")
    ids = assistant.codec.encode(BODY["prompt"])
    output = student.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)
    [choice] = answer["choices"]
    assert choice["text"] == student.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 8, "total_tokens": len(ids) + 8}


def test_token_ids_are_a_prompt_as_well(client, assistant):
    assert text_of(client, prompt=assistant.codec.encode(BODY["prompt"])) == text_of(client)


def test_several_prompts_are_several_choices(client, assistant):
    prompts = ["thou art the", "peace and", "the budget of"]
    alone = [text_of(client, prompt=prompt) for prompt in prompts]
    answer = complete(client, prompt=prompts).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(alone))
    ids = [assistant.codec.encode(prompt) for prompt in prompts]
    assert [choice["text"] for choice in complete(client, prompt=ids).json()["choices"]] == alone
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_a_stream_joins_to_the_completion(client):
    whole = complete(client, logprobs=2).json()["choices"][0]
    *chunks, last = events(complete(client, logprobs=2, stream=True, stream_options={"include_usage": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for choice in choices for value in (choice["logprobs"] or {}).get(name, ())]
        assert joined == whole["logprobs"][name]
    assert choices[-1]["finish_reason"] == "length"
    assert last["usage"] == complete(client).json()["usage"]


def test_an_echoed_prompt_comes_before_its_continuation(client):
    assert text_of(client, echo=True) == BODY["prompt"] + text_of(client)
    streamed = events(complete(client, echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text_of(client, echo=True)


def test_logprobs_of_an_echoed_prompt_are_those_of_a_forward_pass(client, assistant, student):
    text = "peace and the budget of thou"
    ids = assistant.codec.encode(text)
    [choice] = complete(client, prompt=text, echo=True, logprobs=3, max_tokens=0).json()["choices"]
    expected, distributions = reference_logprobs(student, ids)
    found = choice["logprobs"]
    assert choice["text"] == text
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert found["top_logprobs"][0] is None
    for place, top in enumerate(found["top_logprobs"][1:]):
        best = {assistant.codec.token_text(id_) for id_ in distributions[place].topk(3).indices.tolist()}
        assert best <= set(top) <= best | {found["tokens"][place + 1]}
    assert "".join(found["tokens"]) == text
    for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert text[offset:].startswith(token)


def test_special_tokens_of_a_prompt_are_text_and_generated_ones_are_not(client, assistant):
    special = assistant.codec.separator
    given, generated = ([TokenChoice(id_, -1.0) for id_ in (5, special, 6)] for _ in range(2))
    echoed = text_logprobs(assistant.codec, given, 0)
    follows = text_logprobs(assistant.codec, generated, 0, 100, generated=True)
    first, name = (len(assistant.codec.token_text(id_)) for id_ in (5, special))
    assert echoed["text_offset"] == [0, first, first + name]
    assert follows["text_offset"] == [100, 100 + first, 100 + first]
    [choice] = complete(client, prompt=[5, special, 6], echo=True, logprobs=0).json()["choices"]
    text = assistant.codec.decode([5, special, 6])
    assert choice["text"].startswith(text)
    assert choice["logprobs"]["text_offset"][3] == len(text)


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_evaluation_harnesses_ask_for(client, assistant, student, tokens):
    """Echo, log-probabilities and one greedy token more, which needs no second pass, is as with several tokens."""
    ids = assistant.codec.encode("peace and the budget of thou")
    asked = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": tokens}
    [choice] = complete(client, **asked).json()["choices"]
    expected, distributions = reference_logprobs(student, ids)
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(ids) + tokens
    assert found[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert found[len(ids)] == pytest.approx(distributions[-1].max().item(), abs=1e-4)
    assert choice["text"].startswith(student.tokenizer.decode(ids))


def test_logprobs_of_generated_tokens_belong_to_their_text(client):
    [choice] = complete(client, logprobs=2).json()["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 8
    assert all(math.exp(value) <= 1 for value in found["token_logprobs"])
    assert all(2 <= len(top) <= 3 for top in found["top_logprobs"])


def test_a_stop_string_and_a_seed(client):
    full = text_of(client)
    assert text_of(client, stop=[full[4:6]]) == full[: full.index(full[4:6])]
    sampled = [text_of(client, temperature=1, seed=seed, max_tokens=12) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_an_empty_prompt_begins_a_document(client, assistant):
    assert complete(client, prompt="").json()["usage"]["prompt_tokens"] == 1
    assert text_of(client, prompt=None) == text_of(client, prompt=[assistant.codec.separator])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": [1, 999_999]}, "token id 999999"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"max_tokens": 0}, "needs echo"),
        ({"max_tokens": 401}, "at most 400"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": ["x"] * 300}, "prompt"),
        ({"prompt": ["x"] * 9}, "9 prompts times choices are asked for, but at most 8"),
        ({"max_token": 3}, "unrecognised request argument: max_token"),
    ],
)
def test_bad_requests_are_refused(client, changes, says):
    response = client.post(
        "/v1/completions", content=json.dumps(BODY | changes), headers={"Content-Type": "application/json"}
    )
    assert says in error_of(response, 400)["message"]


@pytest.mark.parametrize("changes", [{}, {"echo": True, "max_tokens": 0, "logprobs": 1}])
def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client, assistant, changes):
    context = assistant.engine.context_length
    error = error_of(complete(client, prompt=[300] * (context + 1), **changes), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(context) in error["message"]
    assert str(context + 1) in error["message"]


def test_a_scored_prompt_is_at_most_a_window(client, assistant, monkeypatch):
    limits = dataclasses.replace(assistant.engine.limits, window_tokens=32)
    monkeypatch.setattr(assistant.engine, "limits", limits)
    error = error_of(complete(client, prompt=[300] * 33, echo=True, max_tokens=0, logprobs=1), 400)
    assert "at most 32 tokens, but this one has 33" in error["message"]


def test_a_prompt_that_fills_the_context_can_be_scored(client, assistant):
    ids = [300] * assistant.engine.context_length
    answer = complete(client, prompt=ids, echo=True, max_tokens=0, logprobs=0).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids)
