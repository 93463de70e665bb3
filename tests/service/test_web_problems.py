"""The web page when something goes wrong: keys, busy servers, failures in mid-answer, lost connections."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from scripted_api import Answer, Refusal, answer_of


def test_a_refusal_is_shown_where_the_answer_would_be(page, script):
    script.refusals["chat"].append(Refusal(400, "max_tokens is 9000, but this service generates at most 400 tokens"))
    page.open()
    page.say("Hail!")
    problem = page.one(".answer .problem")
    assert problem.get_attribute("role") == "alert"
    assert "max_tokens is 9000, but this service generates at most 400 tokens" in problem.text
    assert "400" in problem.text
    page.click(".problem .retry")
    page.one(".content", "base heard: Hail!")
    page.gone(".problem")


def test_a_question_that_was_refused_is_no_part_of_the_conversation(page, script):
    script.refusals["chat"].append(Refusal(400, "no"))
    page.open()
    page.say("First")
    page.say("Second")
    assert script.asked[1]["messages"] == [{"role": "user", "content": "Second"}]
    assert not page.all(".turn:first-child .retry"), "the second answer does not rest on it"


def test_one_model_failing_leaves_the_other_alone(page, script):
    script.answers["base"] = answer_of("half a", ending="error")
    page.open("tab=compare")
    page.say("Hail!")
    assert "the engine failed" in page.one(".problem").text
    assert [element.text for element in page.all(".content")] == ["half a", "demo heard: Hail!"]
    page.one(".note", "not part of the conversation")
    del script.answers["base"]
    page.say("More")
    assert script.bodies("base")[1]["messages"] == [{"role": "user", "content": "More"}]
    assert len(script.bodies("demo")[1]["messages"]) == 3


def test_a_connection_that_breaks_in_the_middle_is_told(page, script):
    script.answers["base"] = answer_of("half a sentence", ending="drop")
    page.open()
    page.say("Hail!")
    assert page.one(".content").text == "half a sentence"
    page.one(".problem", "Connection lost")
    page.one(".problem .retry")


def test_a_server_that_cannot_be_reached_is_told_and_tried_again(page):
    page.open()
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.say("Hail!")
        page.one(".problem", "cannot be reached")
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False})
    page.click(".problem .retry")
    page.one(".content", "base heard: Hail!")


def in_seconds(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(("status", "wait"), [(429, lambda: "2"), (503, lambda: "2"), (429, lambda: in_seconds(3))])
def test_a_busy_service_is_tried_again_when_it_said(page, script, status, wait):
    script.refusals["chat"].append(Refusal(status, "the queue is full", {"Retry-After": wait()}))
    page.open()
    page.say("Hail!")
    problem = page.one(".problem", "the queue is full")
    assert ("busy" in problem.text) == (status == 429)
    button = page.one(".problem .retry", "Try again in")
    assert not button.is_enabled()
    page.until(button.is_enabled)
    assert button.text == "Try again"
    button.click()
    page.one(".content", "base heard: Hail!")


def test_a_busy_service_that_does_not_say_how_long_is_given_some_seconds(page, script):
    script.refusals["chat"].append(Refusal(429, "the queue is full"))
    page.open()
    page.say("Hail!")
    page.one(".problem .retry", "Try again in 5 s")


def test_a_service_with_a_key_asks_for_it_before_anything(page, script):
    script.key = "open sesame"
    page.open(ready=False)
    page.one("#notice .problem", "asks for an API key")
    field = page.one("#notice input")
    assert field.get_attribute("type") == "password"
    field.send_keys("wrong")
    page.click("#notice .primary")
    page.one("#notice .problem", "was refused")
    page.one("#notice input").send_keys("open sesame\n")
    page.one("#workspace:not([hidden])")
    assert page.say("Hail!") == ["base heard: Hail!"]
    assert script.authorizations[-1] == "Bearer open sesame"


def test_the_key_stays_in_the_tab_and_nowhere_else(page, script):
    script.key = "open sesame"
    page.open(ready=False)
    page.one("#notice input").send_keys("open sesame\n")
    page.one("#workspace:not([hidden])")
    assert "open sesame" in page.js("return Object.values(sessionStorage)")
    assert page.js("return [localStorage.length, document.cookie]") == [0, ""]
    assert "sesame" not in page.driver.current_url
    page.open()
    page.click("#key-button")
    assert page.one("#key-field").get_attribute("value") == ""
    page.click("#key-forget")
    page.gone("#key-dialog")
    assert page.js("return sessionStorage.length") == 0
    page.say("Hail!")
    page.one(".problem", "asks for an API key")


def test_one_key_answers_every_question_that_waits_for_it(page, script):
    page.open("tab=compare")
    script.key = "open sesame"
    page.say("Hail!")
    assert len(page.all(".problem")) == 2
    page.click("#key-button")
    page.one("#key-field").send_keys("open sesame\n")
    page.gone(".problem")
    page.settled()
    assert [element.text for element in page.all(".content")] == ["base heard: Hail!", "demo heard: Hail!"]


def test_without_a_key_none_is_sent(page, script):
    page.open()
    page.say("Hail!")
    assert set(script.authorizations) == {None}


def test_an_empty_answer_is_no_riddle(page, script):
    script.answers["base"] = Answer([])
    page.open()
    page.say("Hail!")
    page.one(".answer .note", "said nothing")


def test_an_answer_that_was_cut_says_so(page, script):
    script.answers["base"] = answer_of("and then", ending="length")
    page.open()
    page.say("Hail!")
    page.one(".meta", "cut at max tokens")
