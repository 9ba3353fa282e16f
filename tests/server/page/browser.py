"""A browser on the page of a running server."""

import json
import os
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

AXE = files("axe_core_python").joinpath("axe.min.js")


class Page:
    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> "Page":
        self.driver.get(self.url)
        self.until(lambda: self("#state").text == "ready" and self("#model").text)
        return self

    def __call__(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements, read at once: the page may draw them again at any time."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText.trim())"
        texts: list[str] = self.driver.execute_script(script, selector)
        return texts

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until this holds. An element that is drawn again meanwhile is read again."""
        wait = WebDriverWait(self.driver, 30, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda _: condition())

    def type(self, selector: str, text: str) -> None:
        self(selector).clear()
        self(selector).send_keys(text)

    def choose(self, name: str, value: str) -> None:
        self(f"input[name={name}][value={value}]").click()

    def slide(self, to: float) -> None:
        """The knob, by keyboard, from the middle."""
        slider = self("#accuracy")
        slider.send_keys(Keys.HOME if to < 0.5 else Keys.END)
        step = Keys.ARROW_RIGHT if to < 0.5 else Keys.ARROW_LEFT
        slider.send_keys(step * round(100 * min(to, 1 - to)))
        assert self("#accuracy-value").text == f"{to:.2f}"

    def run(self) -> None:
        self("#run").click()
        self.until(lambda: self("#progress").text.startswith("Done"))

    def figures(self, answer: int = 0) -> dict[str, str]:
        items = self.all(".answer")[answer].find_elements(By.CSS_SELECTOR, "dl div")
        return {item.find_element(By.TAG_NAME, "dt").text: item.find_element(By.TAG_NAME, "dd").text for item in items}

    def text(self, answer: int = 0) -> str:
        return str(self.all(".answer pre")[answer].get_property("textContent"))

    def look(self, name: str) -> None:
        """Save a screenshot where LADIMO_SCREENSHOTS says, for people to look at."""
        if directory := os.environ.get("LADIMO_SCREENSHOTS"):
            self.driver.save_screenshot(f"{directory}/{name}.png")

    def check_accessible(self) -> None:
        self.driver.execute_script(AXE.read_text(encoding="utf-8"))
        # As JSON, which escapes what is no Unicode: axe cuts the markup it quotes, perhaps in the middle of a character.
        report: Any = self.driver.execute_async_script("""
            const found = report => report.violations.map(one => [one.id, one.nodes.map(node => node.html)]);
            axe.run().then(report => arguments[0](JSON.stringify(found(report))));
        """)
        assert json.loads(report) == [], report

    def scheme(self, name: str, width: int) -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 1700, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
