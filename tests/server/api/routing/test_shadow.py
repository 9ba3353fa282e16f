"""Shadow quality over HTTP: which answers are replayed, what operators see, and what is never seen anywhere."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import Access
from tests.server.real import serving_model
from tests.server.serving import ADMIN, sample_values, serving

SECRET = "the launch code is 0451"


async def shadow(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/v1/routing")).json()["shadow"]
    return found


async def test_cheaper_policies_are_compared_with_accuracy_1(moe_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    access = Access(admin_key="admin-key")
    async with serving_model(moe_dir, "--shadow-share", "1", access=access) as url, httpx.AsyncClient(base_url=url) as client:

        async def complete(**fields: Any) -> int:
            body = {"prompt": SECRET, "max_tokens": 9, "temperature": 0, "ignore_eos": True, **fields}
            reply = await client.post("/v1/completions", json=body, timeout=60)
            assert reply.status_code == 200, reply.text
            return int(reply.json()["usage"]["completion_tokens"])

        assert await shadow(client) == {"share": 1.0, "policies": {}}
        phases = {"phases": [{"policy": "fast", "until": "prefill"}, {"policy": "full"}]}
        for left_out in ({"routing": "full"}, {"routing": phases}, {"echo": True, "max_tokens": 0, "routing": "fast"}):
            await complete(**left_out)
        tokens = await complete(routing="fast", n=2) + await complete(routing="fast", stop="e")
        tokens += await complete(prompt=[5] * 240, routing="fast", max_tokens=3)
        async with asyncio.timeout(60):
            while (await shadow(client))["policies"].get("fast", {}).get("answers") != 4:
                await asyncio.sleep(0.05)
        figures = (await shadow(client))["policies"]
        assert set(figures) == {"fast"}
        assert figures["fast"]["tokens"] == tokens
        assert 0 <= figures["fast"]["next_token_agreement"] < 1
        assert figures["fast"]["kl"] > 0
        metrics = sample_values((await client.get("/metrics")).content)
        assert metrics['ladimo_shadow_answers_total{policy="fast"}'] == 4
        assert metrics['ladimo_shadow_tokens_total{policy="fast"}'] == tokens
        assert metrics['ladimo_shadow_agreeing_tokens_total{policy="fast"}'] / tokens == figures["fast"]["next_token_agreement"]
        assert metrics['ladimo_shadow_kl_nats_total{policy="fast"}'] / tokens == pytest.approx(figures["fast"]["kl"])
        assert metrics['ladimo_shadow_answers_total{policy="full"}'] == 0
        # The replays do not count as traffic: 9 tokens under full, and 8 in the second phase of the request with phases.
        assert metrics['ladimo_generation_tokens_total{policy="full"}'] == 9 + 8
        canary = await client.put("/admin/routing/canary", json={"policy": "fast", "share": 0.1}, headers=ADMIN)
        assert canary.json()["canary"]["shadow"] == figures["fast"]
    assert caplog.records and SECRET not in caplog.text


async def test_it_is_off_by_default(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.complete("a", routing="fast", max_tokens=2)
        assert (await server.client.get("/v1/routing")).json()["shadow"] is None
        assert server.services.engine.limits.max_replay_tokens == 0
