"""Who takes turns: API keys, or the users that requests name, or nobody."""

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest

from server.app import Access
from tests.server.serving import Parts, Server, serving

TWO_KEYS = Access(api_keys=["one", "two"])
ASKED = [("one", "ann"), ("one", "bob"), ("two", "ann"), ("two", None)]


async def ask(server: Server, key: str, **fields: Any) -> str:
    """Complete a prompt; the id of the answer."""
    body = {"prompt": [1, 2, 3], "max_tokens": 2, **fields}
    answer = await server.client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    name: str = answer.json()["id"]
    return name


@pytest.mark.parametrize(("who", "flows"), [("key", [0, 0, 1, 1]), ("user", [0, 1, 2, 3]), ("none", [0, 0, 0, 0])])
async def test_flows(tmp_path: Path, who: Literal["key", "user", "none"], flows: list[int]) -> None:
    async with serving(tmp_path, Parts(access=TWO_KEYS, fair_queueing=who)) as server:
        seen = server.watch_requests()
        names = [await ask(server, key, user=user) for key, user in ASKED]
    found = [seen[f"{name}-0"].flow for name in names]
    assert [list(dict.fromkeys(found)).index(flow) for flow in found] == flows
    assert not any("one" in flow or "two" in flow for flow in found), "a flow's name tells the key"


async def test_without_keys_everybody_is_one_flow(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        seen = server.watch_requests()
        names = [await ask(server, key) for key in ("one", "two")]
    assert {seen[f"{name}-0"].flow for name in names} == {""}


async def test_a_flood_under_one_key_does_not_keep_another_waiting(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(access=TWO_KEYS, max_queue=40), max_num_seqs=1) as server:
        steps = server.step_by_step()
        order: list[str] = []

        async def one(key: str) -> None:
            await ask(server, key)
            order.append(key)

        flood = [asyncio.create_task(one("one")) for _ in range(12)]
        await server.until(lambda: len(server.services.engine._streams) == 12)
        late = asyncio.create_task(one("two"))
        await server.until(lambda: len(server.services.engine._streams) == 13)
        server.release()
        steps.turn.release(1000)
        await asyncio.gather(*flood, late)
    assert order.index("two") <= 2
