"""The web page: conversations, how they are asked for, and that nothing on it is markup but its own."""

import pytest
from scripted_api import Answer, Token, answer_of

CTRL, ESCAPE, SHIFT, ENTER = "\ue009", "\ue00c", "\ue008", "\ue007"
MARKUP = '<img src=x onerror="window.hacked = true">'


def roles(body):
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_an_answer_streams_in(page, script):
    script.answers["base"] = Answer([("Good ", []), ("morrow", [])], ending="hang")
    page.open()
    page.send("Hail!")
    page.one(".answer[aria-busy='true'] .content", "Good morrow")
    assert page.prompts == ["Hail!"]


def test_the_first_model_is_asked_as_the_settings_say(page, script):
    page.open()
    assert page.say("Hail!") == ["base heard: Hail!"]
    [body] = script.asked
    assert body == {
        "model": "base",
        "messages": [{"role": "user", "content": "Hail!"}],
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.js("const t = document.getElementById('temperature'); t.value = 0; t.dispatchEvent(new Event('input'))")
    page.one("#max-tokens").send_keys("7")
    page.one("#system").send_keys("Speak in verse.")
    page.say("Again!")
    assert (script.asked[1]["temperature"], script.asked[1]["max_tokens"]) == (0, 7)
    assert roles(script.asked[1]) == [
        ("system", "Speak in verse."),
        ("user", "Hail!"),
        ("assistant", "base heard: Hail!"),
        ("user", "Again!"),
    ]


def test_each_model_has_a_conversation_of_its_own(page, script):
    page.open()
    page.say("To the base")
    page.choose("demo")
    assert page.prompts == []
    page.say("To the student")
    assert roles(script.bodies("demo")[0]) == [("user", "To the student")]
    page.choose("base")
    assert page.prompts == ["To the base"]
    page.say("More")
    assert roles(script.asked[-1])[0] == ("user", "To the base")


def test_an_answer_goes_on_while_another_model_is_looked_at(page, script):
    script.answers["base"] = answer_of("one two three four five six seven", pause=0.05)
    page.open()
    page.send("Slowly")
    page.choose("demo")
    page.say("Hail!")
    page.choose("base")
    page.settled()
    assert page.one(".content").text == "one two three four five six seven"


def test_shift_enter_is_a_new_line_and_enter_sends(page, script):
    page.open()
    page.write("first")
    page.press(SHIFT, ENTER)
    page.say("second")
    assert script.asked[0]["messages"][0]["content"] == "first\nsecond"
    page.write(ENTER)
    page.write("   ")
    page.write(ENTER)
    assert len(page.prompts) == 1, "nothing is no message"


@pytest.mark.parametrize("way", ["escape", "button"])
def test_stopping_ends_the_work_and_keeps_what_came(page, script, way):
    script.answers["base"] = Answer([("It was ", []), ("a dark", [])], ending="hang")
    page.open()
    page.send("Tell me")
    page.one(".content", "It was a dark")
    assert not page.all(".send")
    if way == "escape":
        page.press(ESCAPE)
    else:
        page.click(".stop")
    page.settled()
    page.until(lambda: script.given_up == ["base"], "the server still works")
    assert page.one(".answer[data-state='stopped'] .content").text == "It was a dark"
    del script.answers["base"]
    page.say("Go on")
    assert roles(script.asked[1])[:2] == [("user", "Tell me"), ("assistant", "It was a dark")]


def test_an_answer_that_was_stopped_before_it_began_is_no_part_of_the_conversation(page, script):
    script.answers["base"] = Answer([], ending="hang")
    page.open()
    page.send("Tell me")
    page.until(lambda: script.asked)
    page.press(ESCAPE)
    page.settled()
    del script.answers["base"]
    page.say("Again")
    assert roles(script.asked[1]) == [("user", "Again")]


def test_reasoning_is_dimmed_folds_away_and_is_not_sent_back(page, script):
    thoughts = ["They greet me. ", "I greet back."]
    script.answers["base"] = Answer([], reasoning=thoughts, ending="hang")
    page.open()
    page.send("Hail!")
    shown = page.one(".reasoning .text", "They greet me. I greet back.")
    colour = "return getComputedStyle(arguments[0]).color"
    page.press(ESCAPE)
    script.answers["base"] = answer_of("Good morrow", reasoning=thoughts)
    page.say("Hail again!")
    assert page.js(colour, shown) != page.js(colour, page.one(".content", "Good morrow"))
    assert not page.all(".turn:last-child .reasoning .text"), "it folds away when the answer begins"
    page.click(".turn:last-child summary")
    assert page.one(".turn:last-child .reasoning .text").text == "They greet me. I greet back."
    page.say("And?")
    assert ("assistant", "Good morrow") in roles(script.asked[-1])


def test_an_answer_can_be_asked_for_again_as_long_as_nothing_rests_on_it(page, script):
    page.open()
    page.say("One")
    script.answers["base"] = answer_of("another answer")
    page.click(".retry", "Try again")
    page.one(".content", "another answer")
    assert roles(script.asked[1]) == [("user", "One")]
    page.say("Two")
    assert roles(script.asked[2])[1] == ("assistant", "another answer")
    assert len(page.all(".retry")) == 1


def test_clear_forgets_this_conversation_alone(page, script):
    page.open()
    page.say("To the base")
    page.choose("demo")
    page.say("To the student")
    page.click(".actions button", "Clear")
    assert page.prompts == []
    page.say("Afresh")
    assert roles(script.asked[-1]) == [("user", "Afresh")]
    page.choose("base")
    assert page.prompts == ["To the base"]


def test_copy_gives_the_answer_and_the_conversation(page, script):
    page.open()
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.address}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.say("Hail!")
    page.click(".answer-foot button", "Copy")
    page.one(".answer-foot button", "Copied")
    assert page.js("return navigator.clipboard.readText()") == "base heard: Hail!"
    page.click(".toolbar button", "Copy")
    expected = "You:\nHail!\n\nbase:\nbase heard: Hail!"
    page.until(lambda: page.js("return navigator.clipboard.readText()") == expected)


def test_copy_works_where_the_browser_gives_no_clipboard(page):
    page.open()
    page.say("Hail!")
    page.js("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.js("document.addEventListener('copy', () => { window.copied = String(document.activeElement.value); })")
    page.click(".answer-foot button", "Copy")
    page.one(".answer-foot button", "Copied")
    assert page.js("return window.copied") == "base heard: Hail!"


def test_both_models_answer_side_by_side_each_with_its_own_history(page, script):
    page.open("tab=compare")
    assert page.say("Hail!") == ["base heard: Hail!", "demo heard: Hail!"]
    page.say("More")
    for model in ("base", "demo"):
        assert roles(script.bodies(model)[1]) == [
            ("user", "Hail!"),
            ("assistant", f"{model} heard: Hail!"),
            ("user", "More"),
        ]
    left, right = (element.rect for element in page.all(".turn:last-child .answer"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_both_answers_stream_at_once(page, script):
    script.answers = {model: Answer([(f"{model} speaks", [])], ending="hang") for model in ("base", "demo")}
    page.open("tab=compare")
    page.send("Hail!")
    page.one(".answer[aria-busy='true'] .content", "base speaks")
    page.one(".answer[aria-busy='true'] .content", "demo speaks")
    page.press(ESCAPE)
    page.settled()
    page.until(lambda: sorted(script.given_up) == ["base", "demo"])


def test_every_student_is_compared_in_a_conversation_of_its_own(page, script):
    script.models = ["base", "demo", "bard"]
    page.open("tab=compare")
    page.say("With demo")
    page.choose("bard")
    assert page.prompts == []
    assert page.say("With bard") == ["base heard: With bard", "bard heard: With bard"]
    assert roles(script.bodies("base")[-1]) == [("user", "With bard")]


def test_a_service_of_one_model_has_nothing_to_compare(page, script):
    script.models = ["base"]
    page.open("tab=compare")
    assert not page.one("#tab-compare").is_enabled()
    assert page.say("Hail!") == ["base heard: Hail!"]


@pytest.mark.parametrize("colours", [False, True])
def test_nothing_that_anybody_wrote_is_markup(page, script, colours):
    name = f"evil {MARKUP}"
    script.models = ["base", name]
    script.answers[name] = Answer(
        [(MARKUP, [Token(MARKUP.encode(), -1.0, ((MARKUP, -2.0),))])], reasoning=[MARKUP], ending="error"
    )
    page.open("tab=compare")
    page.set_colours(colours)
    page.say(MARKUP)
    assert page.prompts == [MARKUP]
    [_, answer] = page.all(".content")
    assert answer.text == MARKUP
    assert page.all(".who")[1].text == name
    if colours:
        page.point_at(page.one(".answer:last-child .content .token"))
        page.one("#details", MARKUP.replace(" ", "␣"))
    page.click("#tab-perplexity")
    page.one("#perplexity-text").send_keys(f"{MARKUP} {MARKUP}")
    page.click("#score")
    page.one("#results .scored", MARKUP)
    page.open(f"tab=chat&model={MARKUP}")
    page.one("#notice", MARKUP)
    assert page.js("return window.hacked") is None
    assert page.js("return document.querySelectorAll('img[src=x]').length") == 0
    assert page.complaints() == []


def test_the_page_asks_this_server_alone_and_obeys_its_policy(page):
    for tab in ("chat", "compare", "perplexity"):
        page.open(f"tab={tab}")
        loaded = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert loaded
        assert all(name.startswith(page.address) for name in loaded)
    assert page.complaints() == []
    page.js("document.body.append(Object.assign(document.createElement('script'), { text: 'window.ran = 1' }))")
    assert page.js("return window.ran") is None
    assert "Content Security Policy" in page.complaints()[0]
