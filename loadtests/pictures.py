"""Makes the pictures of the documents, docs/images/page.png and frontier.png, from a running server and a report.

    python -m loadtests.pictures models/demo

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium, which is in the dev extra.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

IMAGES = Path(__file__).parent.parent / "docs" / "images"
PROMPT = "def read_lines(path):\n"
WIDTH = 1180
MAX_TOKENS = 40
WAIT_SECONDS = 120


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the documents' pictures.")
    parser.add_argument("model", type=Path, help="a converted checkpoint with its report")
    parser.add_argument("--out", type=Path, default=IMAGES, help="directory of the pictures (default: docs/images)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with browser() as driver:
        with server(options.model) as address:
            take_page(driver, address, options.out / "page.png")
        take_frontier(driver, options.model / "report.html", options.out / "frontier.png")


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    with TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
        try:
            light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
            yield driver
        finally:
            driver.quit()


@contextmanager
def server(model: Path) -> Iterator[str]:
    """Run a server for the model. Yields its address when it accepts requests."""
    command = [sys.executable, "-m", "server", str(model), "--port", "0", "--insecure-admin", "--log-level", "ERROR"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[-1] for line in process.stdout if line.strip().startswith("page"))
        finally:
            process.terminate()


def take_page(driver: webdriver.Chrome, address: str, out: Path) -> None:
    """Take a picture of the page after a completion, with the experts, the frontier and the accuracy slider."""
    resize(driver, WIDTH, 1400)
    driver.get(address)
    wait = WebDriverWait(driver, WAIT_SECONDS)
    wait.until(lambda _: driver.find_element(By.ID, "state").text == "ready")
    driver.execute_script(
        "document.querySelector('#prompt').value = arguments[0];"
        "document.querySelector('input[name=how][value=accuracy]').click();"
        "document.querySelector('#max-tokens').value = arguments[1];"
        "document.querySelector('#prompt').rows = 2;"
        "document.querySelector('#seed').value = 1;",
        PROMPT,
        MAX_TOKENS,
    )
    driver.find_element(By.ID, "run").click()
    wait.until(lambda _: driver.find_element(By.ID, "progress").text.startswith("Done"))
    wait.until(lambda _: "%" in driver.find_element(By.ID, "heat").text)
    end = driver.execute_script("return document.querySelector('#frontier-section').getBoundingClientRect().bottom")
    resize(driver, WIDTH, int(end) + 12)
    driver.save_screenshot(str(out))


def take_frontier(driver: webdriver.Chrome, report: Path, out: Path) -> None:
    """Take a picture of the report's first chart: perplexity by active parameters."""
    resize(driver, WIDTH, 1400, scale=2)
    driver.get(report.resolve().as_uri())
    chart = driver.find_element(By.CSS_SELECTOR, "main figure .chart")
    chart.screenshot(str(out))


def resize(driver: webdriver.Chrome, width: int, height: int, scale: int = 1) -> None:
    """Set the size of the window in CSS pixels. `scale`: pixels of the picture per CSS pixel."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


if __name__ == "__main__":
    main()
