"""The web page's colours of surprise: what they are asked from, which token has which, and how to look at one."""

import math

import pytest
from scripted_api import Answer, Token, answer_of

ARROW_RIGHT, ARROW_LEFT, HOME, END, ESCAPE, TAB = "\ue014", "\ue012", "\ue011", "\ue010", "\ue00c", "\ue004"
EDGES = [0.1, 0.5, 1, 2, 4, 8]  # nats, as in the legend


def pieces(*tokens):
    return [(token.data.decode(), [token]) for token in tokens]


def coloured(page):
    return [(token.text, int(token.get_attribute("data-surprise"))) for token in page.all(".content .token")]


def contrast(first, second):
    """WCAG 2.2: the ratio of relative luminances."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted([luminance(first), luminance(second)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_probabilities_are_asked_for_only_with_the_colours_on(page, script):
    page.open()
    page.say("Off")
    assert "logprobs" not in script.asked[0]
    assert "top_logprobs" not in script.asked[0]
    page.set_colours(True)
    page.say("On")
    assert (script.asked[1]["logprobs"], script.asked[1]["top_logprobs"]) == (True, 5)
    assert len(page.all(".turn:first-child .token")) == 0
    assert len(page.all(".turn:last-child .token")) > 0


def test_each_token_has_the_colour_of_its_surprise(page, script):
    values = [0.0, 0.09, 0.1, 0.49, 0.5, 0.99, 1, 1.99, 2, 3.99, 4, 7.99, 8, 500]
    tokens = [Token(f" t{index}".encode(), -value) for index, value in enumerate(values)]
    script.answers["base"] = Answer(pieces(*tokens))
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    bins = [bin for _, bin in coloured(page)]
    assert bins == [sum(value >= edge for edge in EDGES) for value in values]
    shades = [token.value_of_css_property("background-color") for token in page.all(".content .token")]
    assert len(set(shades)) == len(EDGES) + 1
    legend = [swatch.text for swatch in page.all("#surprise-legend .swatch")]
    assert [float(label) for label in legend] == [0, *EDGES]
    page.one(".meta", f"mean {sum(values) / len(values):.2f} nats")


def test_switching_the_colours_off_leaves_plain_text(page, script):
    script.answers["base"] = Answer(pieces(Token(b"Hail", -9.0)))
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    token = page.one(".content .token")
    clear = "rgba(0, 0, 0, 0)"
    assert token.value_of_css_property("background-color") != clear
    page.set_colours(False)
    page.until(lambda: token.value_of_css_property("background-color") == clear)
    page.point_at(token)
    assert not page.all("#details")


def test_the_text_is_what_the_chunks_say_with_spaces_and_lines(page, script):
    text = "To be,\n  or not — to be…\n\n\tThat is “it” 🦊."
    script.answers["base"] = answer_of(text)
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    assert page.js("return document.querySelector('.content').textContent") == text
    joined = "return [...document.querySelectorAll('.content .token')].map((token) => token.textContent).join('')"
    assert page.js(joined) == text


def test_tokens_that_share_a_character_are_one_piece_with_the_sum_of_their_surprise(page, script):
    fox = "🦊".encode()
    parts = [Token(fox[:1], -1.0), Token(fox[1:3], -0.5), Token(fox[3:] + b"!", -0.75)]
    script.answers["base"] = Answer([("A", [Token(b"A", -0.2)]), ("", parts[:1]), ("", parts[1:2]), ("🦊!", parts[2:])])
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    assert coloured(page) == [("A", 1), ("🦊!", 4)]
    page.point_at(page.all(".content .token")[1])
    page.one("#details", "3 tokens make this character")
    page.one("#details", "2.25 nats")


def test_a_chunk_may_hold_text_that_is_late_or_several_tokens(page, script):
    tokens = [Token(part.encode(), -1.0) for part in ("Good", " mor", "row", "!")]
    script.answers["base"] = Answer([("", tokens[:2]), ("Good morrow", tokens[2:3]), ("!", tokens[3:])])
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    assert [text for text, _ in coloured(page)] == ["Good", " mor", "row", "!"]


def test_text_that_the_tokens_do_not_spell_is_shown_without_colour(page, script):
    script.answers["base"] = Answer(
        [("Good", [Token(b"Good")]), (" morrow", [Token(b" evening")]), ("!", [Token(b"!")])]
    )
    page.open()
    page.set_colours(True)
    assert page.say("Hail!") == ["Good morrow!"]
    assert [text for text, _ in coloured(page)] == ["Good"]


def test_half_a_character_at_the_end_is_shown_as_the_server_shows_it(page, script):
    script.answers["base"] = Answer([("A", [Token(b"A")]), ("\ufffd", [Token("é".encode()[:1])])])
    page.open()
    page.set_colours(True)
    assert page.say("Hail!") == ["A\ufffd"]
    assert [text for text, _ in coloured(page)] == ["A", "\ufffd"]


def test_the_pointer_shows_probability_and_alternatives(page, script):
    token = Token(b" morrow", math.log(0.25), ((" day", math.log(0.5)), (" night", math.log(0.125))))
    script.answers["base"] = Answer(pieces(Token(b"Good"), token))
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    page.point_at(page.all(".content .token")[1])
    details = page.one("#details", "1.39 nats")
    rows = [row.text.split() for row in page.all("#details tr")]
    assert rows == [["␣day", "50.0%"], ["␣morrow", "25.0%"], ["␣night", "12.5%"]]
    assert page.one("#details tr.chosen").text.startswith("␣morrow")
    page.press(ESCAPE)
    page.until(lambda: not details.is_displayed())


def test_a_touch_shows_the_details_until_the_next_one(page, script):
    script.answers["base"] = Answer(pieces(Token(b"Good"), Token(b" morrow", -2.0)))
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    page.touch(page.all(".content .token")[1])
    page.one("#details", "2.00 nats")
    page.touch(page.all(".content .token")[0])
    page.one("#details", "0.50 nats")
    assert len(page.all(".token.current")) == 1
    page.touch(page.one(".prompt"))
    page.gone("#details")
    assert not page.all(".token.current")


def test_the_arrow_keys_go_from_token_to_token_and_it_is_said(page, script):
    script.answers["base"] = Answer(pieces(*(Token(f" {word}".encode(), -1.0) for word in ("one", "two", "three"))))
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    page.js("document.querySelector('#panel-chat').focus()")
    for _ in range(12):
        if page.all(".token.current"):
            break
        page.press(TAB)
    for key, word in [("", "one"), (ARROW_RIGHT, "two"), (ARROW_LEFT, "one"), (ARROW_LEFT, "one"), (END, "three")]:
        if key:
            page.press(key)
        assert page.one(".token.current").text.strip() == word
        page.one("#details", f"␣{word}")
        said = page.js("return document.getElementById('status').textContent")
        assert said == f"{word}: probability 36.8%, 1.00 nats"
    page.press(HOME)
    assert page.one(".token.current").text.strip() == "one"
    page.press(TAB)
    page.gone("#details")


def test_reasoning_is_coloured_too(page, script):
    script.answers["base"] = Answer([("Hail", [Token(b"Hail")])], reasoning=["They greet"])
    page.open()
    page.set_colours(True)
    page.say("Hail!")
    assert coloured(page) == [("Hail", 2)]
    page.click(".reasoning summary")
    assert page.one(".reasoning .text").text == "They greet"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_colour(page, scheme):
    """WCAG 2.2 AA asks for 4.5 to 1; the colours must differ in lightness, not in hue alone."""
    page.emulate(prefers_color_scheme=scheme)
    page.open("tab=perplexity")
    page.click("#example")
    page.click("#score")
    page.one("#results .scored")
    page.set_colours(True)
    code = """
        const probe = document.createElement("span");
        probe.className = "token";
        probe.style.transition = "none";
        document.querySelector(".scored").append(probe);
        probe.setAttribute(arguments[0], arguments[1]);
        const { backgroundColor, color } = getComputedStyle(probe);
        probe.remove();
        return [backgroundColor, color];
    """
    ramps = [("data-surprise", range(1, 7)), ("data-difference", range(1, 5)), ("data-difference", range(-1, -5, -1))]
    for attribute, bins in ramps:
        found = [page.js(code, attribute, str(bin)) for bin in bins]
        assert min(contrast(*pair) for pair in found) >= 4.5
        steps = [contrast(*pair) for pair in found]
        assert steps == sorted(steps, reverse=True), "each step is further from the ground than the one before"
