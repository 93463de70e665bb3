"""The web page over the service itself and a small model: what the stand-in cannot promise."""

import pytest

from nexus_ray.generation.request import SamplingParams
from serve.api import build_api
from serve.guard.keys import KeyFile, new_key


@pytest.fixture
def real_page(page, stage, service):
    stage.app = build_api(service)
    return page


def test_both_models_say_on_the_page_what_the_engine_says(real_page, assistant):
    page = real_page
    page.open("tab=compare")
    page.js("const t = document.getElementById('temperature'); t.value = 0; t.dispatchEvent(new Event('input'))")
    page.one("#max-tokens").send_keys("12")
    page.say("Good morrow, who goes there?")
    shown = page.js("return [...document.querySelectorAll('.content')].map((element) => element.textContent)")
    messages = [{"role": "user", "content": "Good morrow, who goes there?"}]
    params = SamplingParams(temperature=0, max_tokens=12)
    for text, model in zip(shown, ("base", "bard"), strict=True):
        assert text == "".join(piece.text for piece in assistant.generate(messages, model, params))
    assert [meta.text.split(" · ")[:2] for meta in page.all(".meta")] == [["cut at max tokens", "12 tokens"]] * 2


def test_what_the_service_refuses_is_told_in_its_words(real_page):
    page = real_page
    page.open()
    page.one("#max-tokens").send_keys("5000")
    page.say("Hail!")
    page.one(".problem", "max_tokens is 5000, but this service generates at most 400 tokens")


def test_the_colours_are_of_the_model_s_own_probabilities(real_page, assistant):
    page = real_page
    page.open("model=bard")
    page.js("const t = document.getElementById('temperature'); t.value = 0; t.dispatchEvent(new Event('input'))")
    page.one("#max-tokens").send_keys("12")
    page.set_colours(True)
    page.say("Good morrow, who goes there?")
    messages = [{"role": "user", "content": "Good morrow, who goes there?"}]
    params = SamplingParams(temperature=0, max_tokens=12, alternatives=0)
    pieces = list(assistant.generate(messages, "bard", params))
    tokens = page.js("return [...document.querySelectorAll('.content .token')].map((token) => token.textContent)")
    assert tokens == [piece.text for piece in pieces]
    surprises = [-sum(token.logprob for token in piece.tokens) for piece in pieces]
    bins = [int(token.get_attribute("data-surprise")) for token in page.all(".content .token")]
    assert bins == [sum(nats >= edge for edge in (0.1, 0.5, 1, 2, 4, 8)) for nats in surprises]


def test_both_curves_come_from_the_service(real_page, client):
    page, text = real_page, "thou art the king and I thy servant"
    page.open("tab=perplexity")
    box = page.one("#perplexity-text")
    page.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", box, text)
    page.click("#score")
    page.one("#results .scored")
    shown = page.js("return [...document.querySelectorAll('.scored .token')].map((token) => token.textContent)")
    assert "".join(shown) == text
    scores = client.post("/v1/perplexity", json={"text": text}).json()["results"][0]["scores"]
    [row] = [row for row in page.all(".figures tbody tr") if "nats" in row.text.lower()]
    for model in ("base", "bard"):
        assert f"{scores[model]['nats_per_token']:.4g}" in row.text


def test_a_perplexity_that_is_no_finite_number_has_no_value(real_page):
    page = real_page
    page.open("tab=perplexity")
    box = page.one("#perplexity-text")
    page.js("arguments[0].value = 'king'.repeat(250); arguments[0].dispatchEvent(new Event('input'))", box)
    page.click("#score")
    page.one("#results .scored")
    [row] = [row for row in page.all(".figures tbody tr") if "per word" in row.text]
    assert [cell.text for cell in row.find_elements("css selector", "td")] == ["\N{EN DASH}"] * 3


def test_a_service_with_keys_asks_for_one_and_takes_it(page, stage, service, tmp_path):
    key, line = new_key("ann")
    (tmp_path / "keys").write_text(line)
    stage.app = build_api(service, keys=KeyFile(tmp_path / "keys", {}))
    page.open(ready=False)
    page.one("#notice .problem", "needs an API key")
    page.one("#notice input").send_keys(key, "\n")
    page.one("#workspace:not([hidden])")
