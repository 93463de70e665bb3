"""The web page's perplexity tab: what it asks, and that table, charts and colours say what the answer says."""

import re

import pytest
from scripted_api import Refusal, perplexity_of

MINUS = "\N{MINUS SIGN}"
TEXT = "To be, or not to be, that is the question."
ARROW_RIGHT, HOME, END = "\ue014", "\ue011", "\ue010"


@pytest.fixture
def tab(page):
    page.open("tab=perplexity")
    return page


def fill(page, text):
    box = page.one("#perplexity-text")
    page.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", box, text)


def score(page, text=TEXT):
    fill(page, text)
    page.click("#score")
    page.one("#results .scored")


def pieces(page):
    return page.js("return [...document.querySelectorAll('.scored .token')].map((token) => token.textContent)")


def readout(page, index):
    return page.all(".readout")[index].text


def test_all_models_are_asked_for_every_token(tab, script):
    score(tab)
    assert script.asked == [{"text": TEXT, "models": ["base", "demo"], "token_logprobs": True}]


def test_only_the_chosen_models_are_asked(tab, script):
    fill(tab, TEXT)
    tab.click("#perplexity-models label", "demo")
    tab.click("#score")
    tab.one("#results .scored")
    assert script.asked[0]["models"] == ["base"]
    assert len(tab.all(".chart")) == 1, "there is no difference of one model"
    tab.click("#perplexity-models label", "base")
    assert not tab.one("#score").is_enabled()


def test_the_table_shows_the_figures_and_the_ratio(tab):
    score(tab)
    scores = perplexity_of(TEXT, ["base", "demo"])["scores"]
    assert [cell.text for cell in tab.all(".figures thead th")] == ["base", "demo", "demo ÷ base"]
    rows = [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in tab.all(".figures tbody tr")]
    keys = ["token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "nats_per_token"]
    for row, key in zip(rows[:5], keys, strict=True):
        base, demo = scores["base"][key], scores["demo"][key]
        assert row[1:] == [f"{base:.4g}", f"{demo:.4g}", f"{demo / base:.3f}"], key
    counts = [str(scores["base"][key]) for key in ("tokens", "words", "bytes")]
    assert [row[1:] for row in rows[5:]] == [[count, count, ""] for count in counts]
    better = "base" if scores["base"]["bits_per_byte"] < scores["demo"]["bits_per_byte"] else "demo"
    columns = [row.find_elements("css selector", "td") for row in tab.all(".figures tbody tr")]
    best = [[cell.get_attribute("class") == "best" for cell in cells[:2]] for cells in columns]
    assert best == [[better == "base", better == "demo"]] * 5 + [[False, False]] * 3


def test_the_charts_hold_the_running_means_and_their_difference(tab):
    score(tab)
    result = perplexity_of(TEXT, ["base", "demo"])
    base, demo = (result["scores"][model]["token_logprobs"] for model in ("base", "demo"))
    plots = tab.all(".plot")
    for plot in plots:
        assert int(plot.get_attribute("aria-valuemax")) == len(base)
    tab.js("arguments[0].focus({ focusVisible: true })", plots[0])
    tab.press(HOME)
    for _ in range(3):
        tab.press(ARROW_RIGHT)
    means = [-sum(values[:4]) / 4 for values in (base, demo)]
    token = result["tokens"][3].replace(" ", "␣")
    expected = f"{token} (token 4): base {means[0]:.2f}, demo {means[1]:.2f} nats per token so far"
    assert readout(tab, 0) == plots[0].get_attribute("aria-valuetext") == expected
    tab.js("arguments[0].focus({ focusVisible: true })", plots[1])
    tab.press(END)
    apart = (sum(base) - sum(demo)) / len(base)
    shown = f"{apart:.2f}".replace("-", MINUS)
    last = result["tokens"][-1].replace(" ", "␣")
    assert readout(tab, 1) == f"{last} (token {len(base)}): demo {MINUS} base {shown} nats per token so far"


def test_the_pointer_reads_the_chart_and_marks_the_token_in_the_text(tab):
    score(tab)
    plot = tab.one(".plot")
    tab.point_at(plot, dx=plot.size["width"] // 2 - 2)
    last = perplexity_of(TEXT, [])["tokens"][-1]
    assert readout(tab, 0).startswith(last.replace(" ", "␣"))
    assert tab.js("return document.querySelector('.scored .marked').textContent") == last
    tab.point_at(tab.one("#score"))
    assert not tab.js("return document.querySelector('.marked')")
    assert readout(tab, 0).startswith("Point at the chart")


def test_lines_are_drawn_where_the_axes_say(tab):
    score(tab)
    line = tab.js("return document.querySelectorAll('.chart')[0].querySelector('polyline').getAttribute('points')")
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    logprobs = perplexity_of(TEXT, ["base"])["scores"]["base"]["token_logprobs"]
    means = [-sum(logprobs[: end + 1]) / (end + 1) for end in range(len(logprobs))]
    assert len(points) == len(means)
    marks = tab.js(
        "return [...document.querySelector('.chart .axes').children].filter((e) => e.matches('text[text-anchor=end]'))"
        ".map((e) => [Number(e.textContent.replace(arguments[0], '-')), Number(e.getAttribute('y')) - 4])",
        MINUS,
    )
    (low, at_low), (high, at_high) = marks[0], marks[-1]
    assert high > low
    for (_, y), mean in zip(points, means, strict=True):
        assert y == pytest.approx(at_low + (mean - low) / (high - low) * (at_high - at_low), abs=0.1)


def test_the_text_is_coloured_by_the_better_model(tab):
    score(tab)
    result = perplexity_of(TEXT, ["base", "demo"])
    base, demo = (result["scores"][model]["token_logprobs"] for model in ("base", "demo"))
    bins = [int(token.get_attribute("data-difference")) for token in tab.all(".scored .token")]
    for bin, first, second in zip(bins, base, demo, strict=True):
        gain = second - first
        size = sum(abs(gain) >= edge for edge in (0.1, 0.5, 1, 2))
        assert bin == (size if gain > 0 else -size)
    wins = 100 * sum(second > first for first, second in zip(base, demo, strict=True)) / len(base)
    tab.one(".note", f"demo expected {wins:.0f}% of the tokens more than base did")
    tab.js("const s = document.querySelector('#results select'); s.value = '2'; s.dispatchEvent(new Event('change'))")
    bins = [int(token.get_attribute("data-surprise")) for token in tab.all(".scored .token")]
    assert bins == [sum(-value >= edge for edge in (0.1, 0.5, 1, 2, 4, 8)) for value in demo]


@pytest.mark.parametrize("text", [TEXT, "A\n\nB  c\td — “é” 🦊🦊 x", "🦊 first", " leading"])
def test_every_character_of_the_text_is_shown_once(tab, text):
    score(tab, text)
    assert tab.js("return document.querySelector('.scored').textContent") == text
    assert pieces(tab) == perplexity_of(text, ["base"])["tokens"]


def test_tokens_that_share_a_character_are_one_piece(tab):
    code = "import('/web/scored.js').then((module) => arguments[2](module.cut(arguments[0], arguments[1])))"
    found = tab.driver.execute_async_script(code, "x🦊y", [0, 1, 1, 2])
    assert [(piece["text"], piece["indices"]) for piece in found] == [("x", [0]), ("🦊", [1, 2]), ("y", [3])]


def test_more_students_are_each_compared_with_the_base(page, script):
    script.models = ["base", "demo", "bard"]
    page.open("tab=perplexity")
    score(page)
    assert [cell.text for cell in page.all(".figures thead th")][3:] == ["demo ÷ base", "bard ÷ base"]
    assert [len(chart.find_elements("css selector", "polyline")) for chart in page.all(".chart")] == [3, 2]
    options = [option.text for option in page.all("#results option")]
    assert options[:2] == ["better model: base or demo", "better model: base or bard"]


def test_a_long_text_is_drawn(tab):
    text = "word " * 6000
    score(tab, text)
    assert len(pieces(tab)) == len(perplexity_of(text, [])["tokens"])
    points = tab.js("return document.querySelector('polyline').getAttribute('points')")
    assert len(points.split()) <= 1500


def test_control_and_enter_scores(tab, script):
    tab.one("#perplexity-text").send_keys(TEXT)
    tab.press("\ue009", "\ue007")
    tab.one("#results .scored")
    assert script.asked[0]["text"] == TEXT


def test_a_file_is_read(tab, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Où est la 🦊?", "utf-8")
    tab.driver.find_element("id", "perplexity-file").send_keys(str(file))
    tab.until(lambda: tab.one("#perplexity-text").get_attribute("value") == "Où est la 🦊?")
    assert re.match(r"12 characters", tab.one("#perplexity-count").text)


def test_a_dropped_file_is_read_and_one_that_is_no_text_is_refused(tab):
    code = """
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(arguments[0])], "dropped.txt"));
        const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
        document.getElementById("drop").dispatchEvent(event);
        return event.defaultPrevented;
    """
    assert tab.js(code, list(TEXT.encode()))
    tab.until(lambda: tab.one("#perplexity-text").get_attribute("value") == TEXT)
    tab.js(code, [0x50, 0x4B, 0xFF, 0xFE])
    tab.one("#results .problem", "dropped.txt is not text in UTF-8")
    assert tab.one("#perplexity-text").get_attribute("value") == TEXT


def test_failures_are_told_and_tried_again(tab, script):
    script.refusals["perplexity"] = [Refusal(400, "text: more than 1000000 characters in one request")]
    fill(tab, TEXT)
    tab.click("#score")
    tab.one("#results .problem", "more than 1000000 characters")
    tab.click("#results .retry")
    tab.one("#results .scored")
