"""Two replicas on a real Ray cluster in this machine, behind Ray Serve's own HTTP proxy."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.ray.app import build
from deploy.ray.config import DeploymentConfig
from tests.server.real import model_served
from tests.server.serving import events, sample_values

pytestmark = [
    pytest.mark.long,  # a cluster takes half a minute
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Ray's own code
]
APPLICATION = "ladimo"
ADMIN = {"Authorization": "Bearer secret"}
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def http(moe_dir: Path) -> Iterator[httpx.Client]:
    ray = pytest.importorskip("ray")
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"device": "cpu", "admin_key": "secret", "served_model_name": "model"}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(DeploymentConfig(model=str(moe_dir), replicas=2, server=settings)), name=APPLICATION)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def complete(http: httpx.Client, prompt: str, tokens: int = 4, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply


def replicas(http: httpx.Client) -> dict[str, int]:
    """The version of the view of each replica."""
    status = http.get("/v1/replicas").json()
    return {one["replica"]: one["version"] for one in status["replicas"]}


def change(http: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    reply = http.request(method, f"/admin/routing/{path}", json=body, headers=ADMIN)
    assert reply.status_code == 200, reply.text
    return reply.json()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def kill(deployment: str, name: str = "") -> None:
    """Kill the processes of a deployment whose names end with `name`."""
    import ray

    prefix = f"SERVE_REPLICA::{APPLICATION}#{deployment}#"
    actors = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    found = [actor for actor in actors if actor.startswith(prefix) and actor.endswith(name)]
    assert found
    for actor in found:
        ray.kill(ray.get_actor(actor, namespace="serve"))


def test_tokens_are_those_of_one_server(http: httpx.Client, moe_dir: Path) -> None:
    answered = set()
    with model_served(moe_dir) as address, httpx.Client(base_url=address, timeout=WAIT_SECONDS) as alone:
        for number in range(8):
            asked: dict[str, Any] = {"routing": ["full", "fast", {"accuracy": 0.5}][number % 3], "tokens": 12}
            reply, expected = (complete(server, f"{number} is a number", **asked) for server in (http, alone))
            assert reply.json()["choices"] == expected.json()["choices"]
            assert reply.json()["routing"] == expected.json()["routing"]
            stream = complete(http, f"{number} is a number", stream=True, **asked)
            assert stream.headers["content-type"].startswith("text/event-stream")
            text = "".join(event["choices"][0]["text"] for event in events(stream.text))
            assert text == expected.json()["choices"][0]["text"]
            answered |= {reply.headers["x-replica"], stream.headers["x-replica"]}
    assert len(answered) == 2


def test_a_swap_reaches_both_replicas(http: httpx.Client) -> None:
    version = max(replicas(http).values())
    change(http, "PUT", "default", {"policy": "fast"})
    assert list(replicas(http).values()) == [version + 1] * 2
    seen = set()
    for number in range(20):
        reply = complete(http, f"prompt {number}")
        seen.add((reply.headers["x-replica"], reply.headers["x-routing-view"], reply.json()["routing"]["policy"]))
    assert {(view, policy) for _, view, policy in seen} == {(str(version + 1), "fast")} and len(seen) == 2
    change(http, "POST", "rollback")


def test_requests_with_a_common_prefix_go_to_the_replica_that_has_it(http: httpx.Client) -> None:
    def owner(prompt: str) -> str:
        return complete(http, prompt).headers["x-replica"]

    prompts = [f"{number}{number}" + "a long beginning " * 9 for number in range(10, 26)]
    owners = [owner(prompt) for prompt in prompts]
    assert len(set(owners)) == 2
    before = sample_values(http.get("/metrics").content)
    for _ in range(2):
        assert [owner(f"{prompt} and more") for prompt in prompts] == owners
    after = sample_values(http.get("/metrics").content)
    hits = [name for name in after if name.startswith("ladimo_prefix_cache_hits_total")]
    assert len(hits) == 2 and sum(after[name] - before[name] for name in hits) >= 2 * 16 * 128


def test_a_client_that_leaves_ends_its_request(http: httpx.Client) -> None:
    def aborted() -> float:
        values = sample_values(http.get("/metrics").content)
        return sum(value for name, value in values.items() if "request_success_total" in name and 'reason="abort"' in name)

    before = aborted()
    body = {"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 8}
    with http.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_text())
    until(lambda: aborted() == before + 8)


def test_a_killed_replica_costs_no_request_and_its_successor_has_the_view(http: httpx.Client) -> None:
    """A stream that has begun may end with an error. Nothing else may show that a replica was killed."""
    outcomes: Counter[str] = Counter()
    over = threading.Event()

    def load(number: int) -> None:
        with httpx.Client(base_url=http.base_url, timeout=WAIT_SECONDS) as client:
            while not over.is_set():
                stream = number % 2 == 0
                outcomes[outcome(complete(client, f"{number} {time.monotonic()}", tokens=200, stream=stream), stream)] += 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: outcomes["whole"] > 4 and outcomes["stream"] > 4)
        before = replicas(http)
        victim, survivor = sorted(before)
        kill("Replica", victim)
        version = max(before.values())
        change(http, "PUT", "policies/mine", {**http.get("/v1/routing/policies/fast").json(), "name": "mine"})
        change(http, "PUT", "default", {"policy": "mine"})
        assert replicas(http)[survivor] == version + 2
        assert complete(http, "now").json()["routing"]["policy"] == "mine"
        until(lambda: len(replicas(http)) == 2 and set(replicas(http).values()) == {version + 2})
        (successor,) = set(replicas(http)) - {survivor}
        assert successor != victim

        def answered() -> bool:
            reply = complete(http, f"who? {time.monotonic()}")
            assert reply.json()["routing"]["policy"] == "mine" and reply.headers["x-routing-view"] == str(version + 2)
            return reply.headers["x-replica"] == successor

        until(answered)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    print(outcomes)
    assert set(outcomes) <= {"whole", "stream", "stream cut"} and outcomes["stream cut"] <= 4


def test_the_replicas_bring_the_view_back_to_a_new_holder(http: httpx.Client) -> None:
    change(http, "PUT", "policies/kept", {**http.get("/v1/routing/policies/fast").json(), "name": "kept"})
    version = max(replicas(http).values())
    kill("ViewHolder")
    complete(http, "in the meantime")

    def changed() -> bool:
        reply = http.put("/admin/routing/default", json={"policy": "kept"}, headers=ADMIN)
        return reply.status_code == 200

    until(changed)
    assert list(replicas(http).values()) == [version + 1] * 2
    assert complete(http, "now").json()["routing"]["policy"] == "kept"


def outcome(reply: httpx.Response, stream: bool) -> str:
    if not stream:
        return "whole" if len(reply.json()["choices"]) == 1 else reply.text
    parts = events(reply.text)
    if "error" not in parts[-1]:
        return "stream"
    begun = len(parts) > 1 and parts[-1]["error"]["code"] == "engine_dead"
    return "stream cut" if begun else json.dumps(parts)
