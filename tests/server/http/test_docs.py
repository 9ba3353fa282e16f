"""The API's page: from this server alone, under the page's policy, at any prefix."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from server.api.routes.pages import PAGE_POLICY, WEB
from tests.server.api.test_page import driver, model, needs_chromium, url  # noqa: F401
from tests.server.serving import serving


async def test_its_addresses_are_relative_and_all_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.get("/docs")
        assert reply.headers["content-security-policy"] == PAGE_POLICY
        addresses = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', reply.text)
        assert len(addresses) == 3
        for address in addresses:
            assert not address.startswith("/")
            assert "//" not in address
            assert (await server.client.get(f"/{address}")).status_code == 200
        assert 'fetch("openapi.json")' in (WEB / "docs.js").read_text()
        moved = await server.client.get("/docs/")
        assert (moved.status_code, moved.headers["location"]) == (307, "../docs")


@pytest.fixture
def quiet(driver: webdriver.Chrome) -> Iterator[None]:  # noqa: F811
    """The browser has nothing to complain of, such as a script or a style that the policy forbids."""
    driver.get_log("browser")  # type: ignore[no-untyped-call]
    yield
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]


@pytest.mark.slow
@needs_chromium
@pytest.mark.usefixtures("quiet")
def test_it_lists_the_routes_and_asks_no_other_server(driver: webdriver.Chrome, url: str) -> None:  # noqa: F811
    driver.get(f"{url}/docs")
    WebDriverWait(driver, 30).until(lambda _: driver.find_elements("css selector", ".opblock-summary-path"))
    paths = {element.get_attribute("data-path") for element in driver.find_elements("css selector", ".opblock-summary-path")}
    assert {"/v1/completions", "/v1/chat/completions", "/health"} <= paths
    asked = driver.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert asked
    assert all(address.startswith((url, "data:")) for address in asked), asked
