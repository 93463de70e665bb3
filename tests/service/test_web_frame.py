"""The web page around its tabs: addresses, keys, narrow windows, and what listeners and quiet viewers get."""

import pytest
from scripted_api import Answer, answer_of

CTRL, ESCAPE, ENTER, ARROW_RIGHT, TAB = "\ue009", "\ue00c", "\ue007", "\ue014", "\ue004"
TABS = ["chat", "compare", "perplexity"]


def hash_of(page):
    return page.js("return location.hash")


def test_the_address_names_tab_and_model(page):
    page.open()
    assert hash_of(page) == "#tab=chat&model=base"
    page.choose("demo")
    assert hash_of(page) == "#tab=chat&model=demo"
    page.click("#tab-compare")
    assert hash_of(page) == "#tab=compare&model=demo"
    page.click("#tab-perplexity")
    assert hash_of(page) == "#tab=perplexity"
    page.click("#perplexity-models label", "base")
    assert hash_of(page) == "#tab=perplexity&model=demo"


def test_a_link_leads_to_the_same_view(page, script):
    script.models = ["base", "demo", "a student/with & and ="]
    page.open("tab=compare&model=a+student%2Fwith+%26+and+%3D")
    assert page.one("#tab-compare").get_attribute("aria-selected") == "true"
    assert page.radio("a student/with & and =").is_selected()
    page.open("tab=perplexity&model=base&model=demo")
    assert [box.is_selected() for box in page.all("#perplexity-models input")] == [True, True, False]
    page.js("location.hash = '#tab=perplexity'")
    page.until(lambda: [box.is_selected() for box in page.all("#perplexity-models input")] == [True] * 3)


@pytest.mark.parametrize("fragment", ["tab=nonsense", "tab=__proto__", "tab=toString", "%%%", "model=base"])
def test_an_address_that_names_no_tab_leads_to_the_chat(page, fragment):
    page.open(fragment)
    assert page.one("#panel-chat")
    assert page.complaints() == []


def test_a_link_to_a_model_that_is_gone_says_so(page):
    page.open("tab=chat&model=gone")
    page.one("#notice", "This service has no model “gone”")
    assert page.radio("base").is_selected()


def test_the_back_button_goes_back_a_tab(page):
    page.open()
    page.choose("demo")
    page.click("#tab-perplexity")
    page.driver.back()
    page.one("#panel-chat")
    assert page.radio("demo").is_selected()
    page.driver.forward()
    page.one("#panel-perplexity")


def test_a_changed_address_changes_the_view_and_keeps_the_conversation(page):
    page.open()
    page.say("Hail!")
    page.js("location.hash = '#tab=chat&model=demo'")
    page.until(lambda: page.radio("demo").is_selected())
    page.js("location.hash = '#tab=chat&model=base'")
    page.until(lambda: page.prompts == ["Hail!"])


def test_keys_choose_model_and_view(page):
    page.open()
    page.write("x")
    for model in ("demo", "base"):
        page.press(CTRL, "k")
        page.until(page.radio(model).is_selected)
    for tab in ("compare", "perplexity", "chat"):
        page.press(CTRL, "j")
        page.one(f"#panel-{tab}")


def test_the_question_mark_shows_the_keys_but_not_while_writing(page):
    page.open()
    page.write("what?")
    assert not page.all("#help")
    page.click("#help-button")
    page.one("#help", "new line")
    page.press(ESCAPE)
    page.gone("#help")
    page.js("document.activeElement.blur()")
    page.press("?")
    page.one("#help")
    page.press(ENTER)
    page.gone("#help")


def test_the_slash_leads_to_the_box(page):
    page.open()
    page.press("/")
    page.press("a")
    assert page.one(".composer textarea").get_attribute("value") == "a"


def test_arrow_keys_go_through_the_tabs(page):
    page.open()
    page.one("#tab-chat").send_keys(ARROW_RIGHT)
    page.one("#panel-compare")
    assert page.js("return document.activeElement.id") == "tab-compare"


def test_every_field_and_button_has_a_name(page):
    page.open()
    page.say("Hail!")
    code = """
        const named = (e) => e.labels?.length || e.ariaLabel || e.textContent.trim();
        return [...document.querySelectorAll("input, textarea, select, button")].filter((e) => !named(e))
            .map((e) => e.outerHTML);
    """
    assert page.js(code) == []


def test_listeners_hear_of_answers_and_not_of_their_every_word(page, script):
    page.open()
    page.say("Hail!")
    log = page.one(".log")
    assert log.get_attribute("role") == "log"
    assert log.get_attribute("aria-live") == "polite"
    assert page.one(".answer").get_attribute("aria-busy") == "false"
    status = page.driver.find_element("id", "status")
    assert status.get_attribute("aria-live") == "polite"
    assert page.js("return arguments[0].textContent", status) == "base: answer complete"


def test_the_focus_can_be_seen_on_everything_that_takes_it(page):
    page.open()
    page.js("document.querySelector('#tab-chat').focus()")
    code = """
        const element = document.activeElement;
        const probe = document.body.appendChild(document.createElement("i"));
        probe.style.color = "var(--accent)";
        const accent = getComputedStyle(probe).color;
        const ringed = [element, element.nextElementSibling].filter(Boolean).map((e) => getComputedStyle(e))
            .some((style) => style.outlineStyle !== "none" && style.outlineWidth !== "0px");
        const composer = element.closest(".composer");
        const framed = composer && getComputedStyle(composer).borderTopColor === accent;
        return [element.id || element.className || element.tagName, ringed || framed];
    """
    seen = set()
    while len(seen) < 30:
        page.press(TAB)
        name, visible = page.js(code)
        if name == "BODY":
            break
        seen.add(name)
        assert visible, name
    assert {"key-button", "help-button", "panel-chat-input", "temperature", "max-tokens", "system", "surprise"} < seen


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_narrow_window_holds_the_page(page, script, tab, width):
    script.models = ["base", "a-student-with-a-rather-long-name-of-its-own", "b"]
    page.resize(width, 700)
    page.open(f"tab={tab}")
    if tab == "perplexity":
        page.click("#example")
        page.click("#score")
        page.one("#results .scored")
    else:
        page.say("W" * 120)
        page.click(f"#panel-{tab} .settings-toggle")
        page.one("#settings")
        page.click(f"#panel-{tab} .settings-toggle")
        page.gone("#settings")
    wide = "return [document.documentElement.scrollWidth, document.querySelector(arguments[0]).scrollWidth]"
    assert max(page.js(wide, f"#panel-{tab}")) <= width


def test_columns_lie_below_each_other_on_a_phone(page):
    page.resize(390, 800)
    page.open("tab=compare")
    page.say("Hail!")
    first, second = (answer.rect for answer in page.all(".answer"))
    assert first["x"] == second["x"]
    assert first["y"] + first["height"] <= second["y"]


def test_nothing_moves_for_people_who_asked_for_that(page, script):
    moving = "return document.getAnimations().length"
    page.open()
    script.answers["base"] = Answer([], ending="hang")
    page.send("Hail!")
    assert page.until(lambda: page.js(moving)) > 0
    page.emulate(prefers_reduced_motion="reduce")
    page.until(lambda: page.js(moving) == 0)


def test_the_view_follows_the_answer_unless_one_reads_above(page, script):
    script.answers["base"] = answer_of("line\n" * 150, pause=0.01)
    page.open()
    page.send("Hail!")
    at_end = "const p = document.querySelector('#panel-chat'); return p.scrollHeight - p.scrollTop - p.clientHeight"
    page.settled()
    assert page.js(at_end) < 5
    page.send("Again!")
    page.until(lambda: page.js(at_end) < 5, "a message sent is shown")
    page.js("document.querySelector('#panel-chat').scrollTop -= 30")
    place = page.js("return document.querySelector('#panel-chat').scrollTop")
    page.settled()
    assert page.js("return document.querySelector('#panel-chat').scrollTop") == place
