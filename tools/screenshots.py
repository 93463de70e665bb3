"""Pictures of the web page of a running service, for the documentation.

    python tools/screenshots.py http://localhost:8000 docs/images

takes chat, side by side and perplexity in light and dark, and the same at the width of a phone. It needs Chromium with
its driver and selenium (extra `dev`). Answers are sampled: look at the pictures before you keep them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

WAIT = 300  # seconds for an answer
DESKTOP = (1280, 880)
PHONE = (390, 844)
PROMPT = "Good morrow! What is love?"
TEXT = """To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them. To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd."""


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="Take pictures of the web page of a running service.")
    parser.add_argument("url", help="base address of the service, e.g. http://localhost:8000")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    parser.add_argument("--prompt", default=PROMPT, help="what to ask")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    url = arguments.url.rstrip("/")
    for device, size in (("desktop", DESKTOP), ("phone", PHONE)):
        with _browser(size) as driver:
            for scheme in ("light", "dark"):
                _emulate(driver, scheme, size, phone=device == "phone")
                _take(driver, url, arguments.prompt, arguments.output, f"{device}-{scheme}")


def _take(driver: WebDriver, url: str, prompt: str, output: Path, suffix: str) -> None:
    """One picture of each tab."""
    for tab in ("chat", "compare"):
        _open(driver, f"{url}/#tab={tab}")
        _ask(driver, f"#panel-{tab}", prompt, coloured=tab == "compare")
        if tab == "compare":
            _point_at(driver, "#panel-compare .answer:last-child .token:nth-of-type(12)")
        driver.save_screenshot(str(output / f"web-{tab}-{suffix}.png"))
    _open(driver, f"{url}/#tab=perplexity")
    driver.execute_script(
        "const area = document.getElementById('perplexity-text');"
        "area.value = arguments[0]; area.dispatchEvent(new Event('input'));",
        TEXT,
    )
    driver.find_element(By.ID, "score").click()
    _wait(driver, "#results .scored")
    driver.execute_script("document.querySelector('#results').scrollIntoView()")
    _point_at(driver, "#results .plot", share=0.6)
    driver.save_screenshot(str(output / f"web-perplexity-{suffix}.png"))
    driver.execute_script("document.querySelector('.scored').closest('section').scrollIntoView()")
    _point_at(driver, ".scored .token:nth-of-type(16)")
    driver.save_screenshot(str(output / f"web-tokens-{suffix}.png"))


def _open(driver: WebDriver, address: str) -> None:
    driver.get("about:blank")  # an address that differs in its hash alone would not load the page again
    driver.get(address)
    _wait(driver, "#workspace:not([hidden])")


def _ask(driver: WebDriver, panel: str, prompt: str, *, coloured: bool) -> None:
    if coloured:
        driver.execute_script("document.getElementById('surprise').click()")
    driver.find_element(By.CSS_SELECTOR, f"{panel} .composer textarea").send_keys(prompt, Keys.ENTER)
    _wait(driver, f"{panel} .answer[data-state]")
    WebDriverWait(driver, WAIT).until(
        lambda _: not driver.find_elements(By.CSS_SELECTOR, f"{panel} .answer[aria-busy='true']")
    )


def _wait(driver: WebDriver, selector: str) -> None:
    WebDriverWait(driver, WAIT).until(lambda _: driver.find_elements(By.CSS_SELECTOR, selector))


def _point_at(driver: WebDriver, selector: str, share: float = 0.5) -> None:
    """Put a pointer on an element, at a share of its width; a service without probabilities has no tokens.

    The driver's own mouse misses its target in a window of another size than the emulated one.
    """
    driver.execute_script(
        """
        const element = document.querySelector(arguments[0]);
        if (!element) return;
        const box = element.getBoundingClientRect();
        const at = { clientX: box.left + arguments[1] * box.width, clientY: box.top + box.height / 2 };
        for (const kind of ["pointerover", "pointermove"])
            element.dispatchEvent(new PointerEvent(kind, { bubbles: true, ...at }));
        """,
        selector,
        share,
    )


def _emulate(driver: WebDriver, scheme: str, size: tuple[int, int], *, phone: bool) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@contextmanager
def _browser(size: tuple[int, int]) -> Iterator[WebDriver]:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={size[0]},{size[1]}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
