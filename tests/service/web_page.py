"""The web page as a person uses it, in a browser: what the tests of the page say and look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.interaction import POINTER_TOUCH
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT = 15  # seconds


class WebPage:
    """The page of a service, in one tab of a browser.

    Args:
        driver: the browser.
        address: of the service, without a path.
    """

    def __init__(self, driver: WebDriver, address: str) -> None:
        self.driver, self.address = driver, address

    def reset(self) -> None:
        """Forget what earlier tests emulated and logged."""
        self.emulate()
        self.resize(0, 0)
        self.complaints()

    def close(self) -> None:
        """Leave the page, and nothing of it in the browser."""
        if self.driver.current_url.startswith(self.address):
            self.js("sessionStorage.clear()")
        self.driver.get("about:blank")

    def open(self, fragment: str = "", *, ready: bool = True) -> None:
        """Load the page afresh, at `#fragment`."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/{f'#{fragment}' if fragment else ''}")
        if ready:
            self.one("#workspace:not([hidden])")

    def all(self, selector: str) -> list[WebElement]:
        """The elements that can be seen now."""
        return [element for element in self.driver.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]

    def one(self, selector: str, text: str = "") -> WebElement:
        """The first element that can be seen and holds the text, as soon as there is one."""
        return self.until(
            lambda: next((element for element in self.all(selector) if text in element.text), None),
            f"no {selector} with {text!r}",
        )

    def until(self, condition: Callable[[], Any], message: str = "it did not happen") -> Any:
        """Wait until a condition gives something true, and return that."""
        wait = WebDriverWait(self.driver, WAIT, 0.03, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition(), message)

    def gone(self, selector: str) -> None:
        """Wait until no such element can be seen."""
        self.until(lambda: not self.all(selector), f"{selector} stays")

    def click(self, selector: str, text: str = "") -> None:
        """Click on an element."""
        self.one(selector, text).click()

    def press(self, *keys: str) -> None:
        """Press keys together, wherever the focus is."""
        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            chain.key_up(key)
        chain.perform()

    def point_at(self, element: WebElement, dx: int = 0) -> None:
        """Put the mouse on an element, `dx` pixels from its middle."""
        ActionChains(self.driver).move_to_element_with_offset(element, dx, 0).perform()

    def touch(self, element: WebElement) -> None:
        """Touch an element with a finger, for a moment."""
        finger = ActionBuilder(self.driver, mouse=PointerInput(POINTER_TOUCH, "finger"))
        finger.pointer_action.move_to(element).pointer_down().pointer_up()
        finger.perform()

    def js(self, code: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(code, *arguments)

    def write(self, prompt: str) -> None:
        """Type into the box of the visible tab."""
        self.one(".composer textarea").send_keys(prompt)

    def say(self, prompt: str) -> list[str]:
        """Send a message and wait for the end of every answer to it; their texts."""
        self.send(prompt)
        self.settled()
        return [element.text for element in self.all(".turn:last-child .content")]

    def send(self, prompt: str) -> None:
        """Send a message."""
        before = len(self.all(".turn"))
        self.write(prompt)
        self.write(Keys.ENTER)
        self.until(lambda: len(self.all(".turn")) > before, "the message was not sent")

    def settled(self) -> None:
        """Wait until nothing streams in any more."""
        self.until(lambda: self.all(".send") and not self.all(".answer[aria-busy='true']"), "the answer does not end")

    def choose(self, model: str) -> None:
        """Talk to a model."""
        self.js("arguments[0].click()", self.radio(model))

    def radio(self, model: str) -> WebElement:
        """The choice of a model in the visible tab."""
        radios = self.driver.find_elements(By.CSS_SELECTOR, ".talk:not([hidden]) .segmented input")
        return next(radio for radio in radios if radio.get_attribute("value") == model)

    @property
    def prompts(self) -> list[str]:
        """What was asked in the visible conversation."""
        return [element.text for element in self.all(".prompt")]

    def set_colours(self, on: bool) -> None:
        """Switch the colours of surprise."""
        box = self.driver.find_element(By.ID, "surprise")
        if box.is_selected() != on:
            self.js("arguments[0].click()", box)

    def emulate(self, **features: str) -> None:
        """Media features such as `prefers_color_scheme="dark"`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def resize(self, width: int, height: int) -> None:
        """The size of the window as the page sees it; 0 gives the real one back."""
        if not width:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            return
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def complaints(self) -> list[str]:
        """Errors that the browser logged since the last call, such as refusals by the content security policy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
