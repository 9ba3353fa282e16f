"""A browser, a model and a server for the tests of the page."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from server.app import Access
from tests.factories import make_moe
from tests.server.page.browser import Page
from tests.server.real import model_served

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1700"),
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("page") / "demo", num_experts=8)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with model_served(model, "--shadow-share", "1", access=Access(open_admin=True)) as address:
        yield f"{address}/"


@pytest.fixture
def page(driver: webdriver.Chrome, url: str) -> Iterator[Page]:
    """Asserts afterwards that the browser had nothing to complain of."""
    driver.get("about:blank")  # the page of a server that has ended would still ask it for metrics
    driver.get_log("browser")  # type: ignore[no-untyped-call]
    yield Page(driver, url)
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]
    assert errors == []
