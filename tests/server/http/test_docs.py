"""The API's page: under the page's policy, at any prefix. tests/server/page/test_page.py opens it in a browser."""

import re
from pathlib import Path

from server.api.routes.pages import PAGE_POLICY, WEB
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
