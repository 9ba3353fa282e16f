"""A real Prometheus scrapes a real server under load, and every query of every dashboard and alert is put to it.

A query answers with data, or its panel says when it is empty.
"""

import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import Access
from tests.deploy.queries import PROMETHEUS, Query, dashboard_queries, rule_queries
from tests.factories import make_moe
from tests.server.real import model_served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"),
]
LOAD_SECONDS = 5.0
DEFAULTS: list[dict[str, Any]] = [{"policy": "fast"}, {"accuracy": 1.0}, {"auto": {"itl_ms": 1000, "min_accuracy": 0.5}}]


@contextmanager
def running_prometheus(directory: Path, target: str) -> Iterator[httpx.Client]:
    """Our configuration, scraping and evaluating every second."""
    shutil.copytree(PROMETHEUS, directory / "etc")
    config = directory / "etc" / "prometheus.yml"
    config.write_text(config.read_text().replace("interval: 5s", "interval: 1s").replace("interval: 15s", "interval: 1s"))
    shutil.rmtree(directory / "etc" / "targets")
    (directory / "etc" / "targets").mkdir()
    (directory / "etc" / "targets" / "server.yml").write_text(f'- targets: ["{target}"]\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    if client.get("/-/ready").status_code == 200:
                        break
                except httpx.ConnectError:
                    pass
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            yield client
        finally:
            process.terminate()
            process.communicate(timeout=30)


def load(server: httpx.Client, stop: threading.Event) -> None:
    """Requests under every kind of routing, some of them wrong."""
    for routing in cycle(["fast", {"accuracy": 0.5}, "nope", "auto", "full", None, "balanced"]):
        if stop.is_set():
            return
        body = {"prompt": "def f(", "max_tokens": 24, "ignore_eos": True, "routing": routing}
        reply = server.post("/v1/completions", json=body)
        assert reply.status_code == (404 if routing == "nope" else 200), reply.text


def ask(prometheus: httpx.Client, expr: str) -> list[Any]:
    reply = prometheus.get("/api/v1/query", params={"query": expr}).json()
    assert reply["status"] == "success", (expr, reply)
    result: list[Any] = reply["data"]["result"]
    return result


def has_data(result: list[Any]) -> bool:
    return any(not math.isnan(float(sample["value"][1])) for sample in result)


def test_every_query_returns_data_under_load(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe")
    with (
        model_served(moe, access=Access(open_admin=True)) as url,
        httpx.Client(base_url=url, timeout=30) as server,
        running_prometheus(tmp_path, url.removeprefix("http://")) as prometheus,
    ):
        stop, failures = threading.Event(), list[BaseException]()

        def client() -> None:
            try:
                load(server, stop)
            except BaseException as error:
                failures.append(error)

        clients = [threading.Thread(target=client) for _ in range(3)]
        for thread in clients:
            thread.start()
        try:
            ended = time.monotonic() + LOAD_SECONDS
            for default in cycle(DEFAULTS):
                assert server.put("/admin/routing/default", json=default).status_code == 200
                time.sleep(1.5)
                if "auto" in default and time.monotonic() > ended:
                    break
            queries: list[Query] = [*dashboard_queries(), *rule_queries()]
            answers = {query: has_data(ask(prometheus, query.expr)) for query in queries}
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        assert failures == []
        empty = {query.where for query, data in answers.items() if not data and not query.empty}
        assert empty == set()
        firing = ask(prometheus, 'ALERTS{alertstate="firing"}')
        assert firing == []
        health = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for group in health for rule in group["rules"]} == {"ok"}

        # What Prometheus has stored is what the server says.
        time.sleep(2.5)
        said = server.get("/metrics").text
        for name in ("ladimo_generation_tokens_total", "ladimo_step_tokens_sum"):
            total = sum(
                float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
            )
            (sample,) = ask(prometheus, f"sum ({name})")
            assert float(sample["value"][1]) == total > 0
