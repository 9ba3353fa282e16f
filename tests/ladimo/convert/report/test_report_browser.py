"""report.html in a real browser, where Chromium is installed: light and dark, wide and narrow, sorted, accessible."""

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from selenium import webdriver

from ladimo.checkpoint import read_json
from ladimo.convert.pipeline import convert
from ladimo.convert.report_files import render_report
from tests.ladimo.convert.conftest import small_recipe
from tests.ladimo.convert.report.test_report import EXTRAS

AXE = files("axe_core_python").joinpath("axe.min.js")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage")
TABLE = "document.querySelectorAll('section table')[1]"  # the policies

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="chromium or chromedriver is not installed (Debian: chromium, chromium-driver)",
)


@pytest.fixture(scope="module")
def made(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section that a method with routers can have."""
    out = tmp_path_factory.mktemp("browser") / "moe"
    convert(str(source), out, small_recipe(method="ladimo"), [text])
    render_report(out, EXTRAS)
    return out


@pytest.fixture(scope="module")
def driver(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        driver.get((made / "report.html").as_uri())
        yield driver
    finally:
        driver.quit()


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1280),
        ("dark", 380),
        *(pytest.param(*look, marks=pytest.mark.long) for look in [("dark", 1280), ("light", 380)]),
    ],
)
def test_it_is_accessible_and_fits(driver: webdriver.Chrome, scheme: str, width: int) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 1700, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true;")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    driver.execute_script(AXE.read_text(encoding="utf-8"))
    report: str = driver.execute_async_script("""
        const found = report => report.violations.map(one => [one.id, one.nodes.map(node => node.html)]);
        axe.run().then(report => arguments[0](JSON.stringify(found(report))));
    """)
    assert json.loads(report) == []


def test_tables_are_sorted_by_their_headers(driver: webdriver.Chrome, made: Path) -> None:
    names = [entry["policy"] for entry in read_json(made / "report.json")["policies"]]

    def column(number: int) -> list[str]:
        found: list[str] = driver.execute_script(
            f"return [...{TABLE}.tBodies[0].rows].map(row => row.cells[{number}].innerText)"
        )
        return found

    def click(number: int) -> str:
        driver.execute_script(f"{TABLE}.querySelectorAll('th button')[{number}].click()")
        sort: str = driver.execute_script(f"return {TABLE}.querySelectorAll('th')[{number}].ariaSort")
        return sort

    assert column(0) == names
    assert click(2) == "ascending"
    perplexities = [float(text) for text in column(2)]
    assert perplexities == sorted(perplexities)
    assert click(2) == "descending"
    assert [float(text) for text in column(2)] == sorted(perplexities, reverse=True)
    assert click(0) == "ascending"
    assert column(0) == sorted(names, key=str.lower)


def test_nothing_is_asked_for_and_nothing_fails(driver: webdriver.Chrome) -> None:
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert driver.get_log("browser") == []  # type: ignore[no-untyped-call]
