"""POST /v1/perplexity: the figures of lm-eval's rolling log-likelihood, of all models side by side."""

import math

import pytest
import torch
from asking import error_of

from nexus_ray.config import ModelSection
from nexus_ray.modeling.loading import load_base, load_student

TEXT = "thou art the king and I thy servant; speak, good sir, or be silent. " * 4


@pytest.fixture(scope="session")
def references(micro_model, micro_overlay):
    section = ModelSection(path=micro_model)
    return {"base": load_base(section), "bard": load_student(section, micro_overlay)}


def nats_by_hand(loaded, text, length):
    """Sum over disjoint targets of [separator, text], each window of `length` tokens, as lm-eval cuts them."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *ids]
    total, done = 0.0, 0
    while done < len(ids):
        end = min(done + length, len(ids))
        first = max(0, end - length) if done else 0
        window = torch.tensor([stream[first:end]])
        with torch.no_grad():
            log_probs = loaded.model(window).logits[0].double().log_softmax(-1)
        for target in range(done, end):
            total -= log_probs[target - first, ids[target]].item()
        done = end
    return total, len(ids)


def test_the_figures_are_those_worked_out_by_hand(client, references):
    answer = client.post("/v1/perplexity", json={"texts": ["thou art the king", TEXT]}).json()
    assert (answer["object"], answer["models"], answer["sequence_length"]) == ("perplexity", ["base", "bard"], 32)
    for result, text in zip(answer["results"], ["thou art the king", TEXT], strict=True):
        for model, loaded in references.items():
            nats, tokens = nats_by_hand(loaded, text, 32)
            score = result["scores"][model]
            assert score["tokens"] == tokens
            assert score["bytes"] == len(text.encode())
            assert score["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
            assert score["token_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
            assert score["byte_perplexity"] == pytest.approx(math.exp(nats / len(text.encode())), rel=1e-4)
            assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
            if nats / score["words"] < 700:
                assert score["word_perplexity"] == pytest.approx(math.exp(nats / score["words"]), rel=1e-3)
    assert answer["results"][1]["scores"]["base"] != answer["results"][1]["scores"]["bard"]


def test_models_are_chosen_by_name(client):
    both = client.post("/v1/perplexity", json={"text": TEXT}).json()["results"][0]["scores"]
    for asked in ({"model": "bard"}, {"models": ["bard"]}, {"models": ["bard", "bard"]}):
        [one] = client.post("/v1/perplexity", json={"text": TEXT} | asked).json()["results"]
        assert list(one["scores"]) == ["bard"]
        assert one["scores"]["bard"]["nats_per_token"] == pytest.approx(both["bard"]["nats_per_token"], rel=1e-5)


def test_windows_are_the_request_s_to_choose(client):
    def nats(**windows):
        answer = client.post("/v1/perplexity", json={"text": TEXT, "model": "base"} | windows).json()
        return answer["results"][0]["scores"]["base"]["nats_per_token"]

    assert nats(sequence_length=32) == pytest.approx(nats(), rel=1e-6)
    assert nats(sequence_length=32, stride=32) == pytest.approx(nats(), rel=1e-6)
    assert len({round(nats(**windows), 6) for windows in ({}, {"stride": 8}, {"sequence_length": 64})}) == 3


def test_tokens_and_their_places_come_when_asked(client, assistant):
    text = "naïve 🎭 king"
    answer = client.post("/v1/perplexity", json={"text": text, "token_logprobs": True}).json()
    [result] = answer["results"]
    ids = assistant.codec.encode(text)
    assert len(result["tokens"]) == len(result["offsets"]) == len(ids)
    for score in result["scores"].values():
        assert len(score["token_logprobs"]) == len(ids)
        assert -sum(score["token_logprobs"]) / len(ids) == pytest.approx(score["nats_per_token"])
    for token, offset in zip(result["tokens"], result["offsets"], strict=True):
        assert text[offset:].startswith(token) or token.startswith("bytes:")
    assert any(token.startswith("bytes:") for token in result["tokens"])
    plain = client.post("/v1/perplexity", json={"text": text}).json()["results"][0]
    assert set(plain) == {"index", "scores"}


def test_special_tokens_in_a_text_are_text(client):
    text = "a<|return|>b"
    [result] = client.post("/v1/perplexity", json={"text": text, "token_logprobs": True}).json()["results"]
    assert "".join(result["tokens"]) == text


def test_a_word_of_a_thousand_letters_has_no_finite_word_perplexity(client):
    [result] = client.post("/v1/perplexity", json={"text": "king" * 250}).json()["results"]
    assert result["scores"]["base"]["word_perplexity"] is None
    assert result["scores"]["base"]["token_perplexity"] > 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "text"),
        ({"text": "a", "texts": ["b"]}, "text"),
        ({"text": ""}, "text"),
        ({"texts": []}, "texts"),
        ({"texts": ["a", ""]}, "texts"),
        ({"text": "a" * 1_000_001}, "characters"),
        ({"text": "a", "model": "base", "models": ["bard"]}, "model"),
        ({"text": "a", "sequence_length": 10**6}, "at most"),
        ({"text": "a", "stride": 64}, "stride"),
        ({"text": "king " * 150_000, "stride": 1}, "tokens would have to be read"),
        ({"text": "a", "stride": 0}, "stride"),
    ],
)
def test_bad_requests_are_refused(client, body, says):
    error = error_of(client.post("/v1/perplexity", json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


def test_an_unknown_model_is_not_found(client):
    error = error_of(client.post("/v1/perplexity", json={"text": "a", "models": ["base", "gpt-5"]}), 404)
    assert "'base', 'bard'" in error["message"]
