"""Who uses the server during a soak test: visitors, who ask and sometimes leave, and an operator, who turns every knob."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx

from loadtests.soaking.asks import COMPLETIONS, RESPONSES, Ask, Asks
from loadtests.soaking.ledger import HIDDEN, LEFT, REFUSED, Answer, Ledger

LEAVING_SHARE, CROWD_SHARE = 0.15, 0.01
CROWD = 24  # requests that one visitor sends at once, so that the queue fills up
OWN = "soak-own"  # a policy that the operator stores and removes
LOOKS = ["/metrics", "/v1/routing", "/v1/models", "/health", "/", "/openapi.json"]
LATE = "deadline_exceeded"


class Visitor:
    """Asks one request after another."""

    def __init__(self, http: httpx.AsyncClient, asks: Asks, ledger: Ledger, chance: random.Random) -> None:
        self._http, self._asks, self._ledger, self._chance = http, asks, ledger, chance

    async def visit_once(self) -> None:
        """One request that is answered as a whole."""
        await self._ask(self._asks.plain())

    async def visit(self) -> None:
        """A request, many at once, or one whose client leaves."""
        number = self._chance.random()
        if number < LEAVING_SHARE:
            await self._leave(self._asks.long_stream(LEFT))
        elif number < LEAVING_SHARE + CROWD_SHARE:
            await asyncio.gather(*(self._ask(self._asks.draw()) for _ in range(CROWD)))
        else:
            await self._ask(self._asks.draw())

    async def _ask(self, ask: Ask) -> None:
        self._ledger.kinds[ask.kind] += 1
        headers = {"Content-Type": "application/json", **ask.headers}
        try:
            async with self._http.stream("POST", ask.path, content=ask.content, headers=headers) as reply:
                if reply.status_code != 200:
                    self._refused(ask, reply, json.loads(await reply.aread())["error"])
                elif ask.refused is not None:
                    raise AssertionError(f"was answered, but {ask.refused} was expected")
                elif ask.streams:
                    await self._read_stream(ask, reply)
                else:
                    answer = json.loads(await reply.aread())
                    ask.check(answer)
                    self._answered(ask, _finish_reasons(answer), answer["usage"], answer["routing"])
        except (httpx.HTTPError, AssertionError, LookupError, TypeError, ValueError) as error:
            self._ledger.unexpected.append(f"{ask.kind}: {type(error).__name__}: {error}; sent {ask.content[:300]!r}")

    def _refused(self, ask: Ask, reply: httpx.Response, error: dict[str, Any]) -> None:
        code, policy = error["code"], reply.headers["X-Routing-Policy"]
        if code == LATE and ask.late:
            self._ledger.started_and_failed(ask.requested, policy, "body", code)
            return
        self._ledger.failures[code,] += 1
        if code == REFUSED:
            assert 1 <= int(reply.headers["Retry-After"]) <= 120
        else:
            assert code == ask.refused, f"got {reply.status_code} {error}"

    async def _read_stream(self, ask: Ask, reply: httpx.Response) -> None:
        reasons: list[str] = []
        usage, routing, done = None, None, False
        async for event in _events(reply):
            if event is None:
                done = True
            elif event.get("error"):
                assert ask.late and event["error"]["code"] == LATE, event
                self._ledger.started_and_failed(ask.requested, reply.headers["X-Routing-Policy"], "body", LATE)
                return
            elif ask.path == RESPONSES:
                if "usage" in (found := event.get("response", {})) and found["usage"]:
                    reasons, usage, routing, done = _finish_reasons(found), found["usage"], found["routing"], True
            else:
                reasons += [choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]]
                usage, routing = event.get("usage") or usage, event.get("routing") or routing
        assert done and usage and routing, "the stream was cut off"
        self._answered(ask, reasons, usage, routing)

    def _answered(self, ask: Ask, reasons: list[str], usage: dict[str, Any], routing: dict[str, Any]) -> None:
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        completion = usage.get("completion_tokens", usage.get("output_tokens"))
        assert prompt is not None and completion is not None
        self._ledger.answered(Answer(ask.requested, routing, reasons, prompt * ask.choices, completion))

    async def _leave(self, ask: Ask) -> None:
        """Send a request and leave at some moment: before the end of its head or body, at once, or within the answer."""
        self._ledger.kinds[ask.kind] += 1
        self._ledger.left += 1
        body, url = ask.content, self._http.base_url
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        sent = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        moment = self._chance.choice(["head", "body", "at once", "soon", "first byte", "later", "half closed"])
        cut = {"head": len(head) // 2, "body": len(sent) - len(body) // 2}.get(moment, len(sent))
        reader, writer = await asyncio.open_connection(url.host, url.port)
        status = b""
        try:
            writer.write(sent[:cut])
            await writer.drain()
            if moment == "soon":
                await asyncio.sleep(self._chance.random() * 0.1)
            elif moment in ("first byte", "later", "half closed"):
                if moment == "half closed":
                    writer.write_eof()
                status = (await reader.readline()).split(b" ")[1]
                if moment == "later":
                    await asyncio.sleep(self._chance.random())
                elif moment == "half closed":
                    await reader.read()
        except (OSError, IndexError):
            pass  # the server may have closed the connection first
        finally:
            if self._chance.random() < 0.5:
                writer.transport.abort()
            writer.close()
        if status == b"429":
            self._ledger.failures[REFUSED,] += 1
        elif not status:
            self._ledger.unsure += 1


class Operator:
    """Changes the default, policies and the canary, and looks at everything. Must be the only one who does."""

    def __init__(self, http: httpx.AsyncClient, ledger: Ledger, chance: random.Random) -> None:
        self._http, self._ledger, self._chance = http, ledger, chance
        self._default = "full"  # the policy that the default means, as far as it is not OWN

    async def prepare(self) -> None:
        """Store the policies of requests that are counted apart."""
        layers = (await self._http.get("/v1/routing/policies/fast")).raise_for_status().json()
        for name in (LEFT, HIDDEN):
            content = {key: layers[key] for key in ("layers", "head_bits", "head_refine") if key in layers}
            (await self._http.put(f"/admin/routing/policies/{name}", json=content)).raise_for_status()
        self._content = content

    async def work(self, pause: float, over: asyncio.Event) -> None:
        """Until `over` is set. `pause`: the mean seconds between two actions."""
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self._chance.expovariate(1 / pause))
                return
            await self._act()

    async def finish(self) -> None:
        """Leave the server with a plain default."""
        await self._swap("PUT", "/admin/routing/default", {"policy": "full"})
        await self._change("POST", "/admin/routing/canary/rollback", None, "no_canary")

    async def _act(self) -> None:
        chance = self._chance
        name, accuracy = chance.choice(["full", "quality", "balanced", "fast", OWN]), round(chance.random(), 2)
        target = {"ttft_ms": chance.choice([1, 50, 5000]), "itl_ms": chance.choice([1, 20, None]), "min_accuracy": 0.2}
        candidate: dict[str, Any] = chance.choice([{"policy": "balanced"}, {"accuracy": accuracy}])
        match chance.choice(["named", "accuracy", "auto", "auto", "roll back", "put", "delete", "canary", "canary", "look"]):
            case "named":
                await self._swap("PUT", "/admin/routing/default", {"policy": name}, "unknown_policy")
            case "accuracy":
                await self._swap("PUT", "/admin/routing/default", {"accuracy": accuracy})
            case "auto":
                await self._swap("PUT", "/admin/routing/default", {"auto": target})
            case "roll back":
                await self._swap("POST", "/admin/routing/rollback", None, "no_previous_default")
            case "put" if self._default != OWN:  # a new version of the default itself would be one more swap
                content = {**self._content, "description": f"version {accuracy}"}
                await self._change("PUT", f"/admin/routing/policies/{OWN}", content)
            case "delete" if self._default != OWN:
                await self._change("DELETE", f"/admin/routing/policies/{OWN}", None, "unknown_policy", "policy_in_use")
            case "canary":
                await self._change("PUT", "/admin/routing/canary", {**candidate, "share": 0.3})
                if chance.random() < 0.3:
                    await self._swap("POST", "/admin/routing/canary/promote", None)
                elif chance.random() < 0.5:
                    await self._change("POST", "/admin/routing/canary/rollback", None)
            case _:
                reply = await self._http.get(chance.choice(LOOKS))
                if reply.status_code != 200:
                    self._ledger.unexpected.append(f"operator: {reply.url}: {reply.status_code} {reply.text[:300]}")

    async def _swap(self, method: str, path: str, body: Any, *refused: str) -> None:
        answer = await self._change(method, path, body, *refused)
        if answer is not None:
            self._ledger.swaps += 1
            self._default = answer["default"]["policy"]

    async def _change(self, method: str, path: str, body: Any, *refused: str) -> dict[str, Any] | None:
        """The answer; None if it was refused with one of these codes."""
        reply = await self._http.request(method, path, json=body)
        answer: dict[str, Any] = reply.json()
        if reply.status_code == 200:
            return answer
        self._ledger.failures[answer["error"]["code"],] += 1
        if answer["error"]["code"] not in refused:
            self._ledger.unexpected.append(f"operator: {method} {path}: {reply.status_code} {answer}; sent {body}")
        return None


async def _events(reply: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The data of a stream's events; None for [DONE]."""
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line[6:])


def _finish_reasons(answer: dict[str, Any]) -> list[str]:
    """Of the choices of an answer. A response has one, and says it in other words."""
    if answer["object"] != "response":
        return [choice["finish_reason"] for choice in answer["choices"]]
    return ["length" if answer["status"] == "incomplete" else "stop"]
