"""The web page over the service itself and a small model: what the stand-in cannot promise."""

import pytest

from nexus_ray.generation.request import SamplingParams
from serve.routes import build_api


@pytest.fixture
def real_page(page, stage, service):
    stage.app = build_api(service)
    return page


def test_both_models_say_on_the_page_what_the_engine_says(real_page, engine):
    page = real_page
    page.open("tab=compare")
    page.js("const t = document.getElementById('temperature'); t.value = 0; t.dispatchEvent(new Event('input'))")
    page.one("#max-tokens").send_keys("12")
    page.say("Good morrow, who goes there?")
    shown = page.js("return [...document.querySelectorAll('.content')].map((element) => element.textContent)")
    messages = [{"role": "user", "content": "Good morrow, who goes there?"}]
    params = SamplingParams(temperature=0, max_tokens=12)
    for text, which in zip(shown, ("base", "student"), strict=True):
        assert text == "".join(piece.text for piece in engine.generate(messages, which, params))
    assert [meta.text.split(" · ")[:2] for meta in page.all(".meta")] == [["cut at max tokens", "12 tokens"]] * 2


def test_what_the_service_refuses_is_told_in_its_words(real_page):
    page = real_page
    page.open()
    page.one("#max-tokens").send_keys("5000")
    page.say("Hail!")
    page.one(".problem", "max_tokens is 5000, but this service generates at most 400 tokens")
