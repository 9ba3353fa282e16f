"""The closed-loop sweep: clients ask again when they have their answer, and servers stand side by side."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from loadtests import sweep
from loadtests.load.arrivals import Arrival
from loadtests.load.client import Client, Outcome
from loadtests.load.servers import Server, parse_server, running
from loadtests.load.steps import step_figures
from loadtests.load.workload import Lengths, Planned, parse_routing, plan
from tests.server.serving import Parts, serving_http

STARTS_LATE = """
import http.server, sys, time
time.sleep(0.3)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


async def test_a_closed_loop_keeps_its_clients_busy(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(max_queue=64)) as server:
        seen: list[int] = []

        class Watched(Client):
            async def _one(self, request: Planned) -> Outcome:
                seen.append(server.services.admission.in_flight)
                return await super()._one(request)

        client = Watched(server.client)
        planned = plan([Arrival(0.0)] * 12, list(range(3, 60)), Lengths(3, 5), Lengths(4, 4), [parse_routing("full")], 0, 60, 1)
        outcomes = await client.run_closed(planned, 3)
        assert len(outcomes) == 12 and all(each.completed for each in outcomes)
        assert max(seen) <= 2, "a client asked again before it had its answer"
        assert all(each.ttft is not None and 0 < each.ttft < 30 for each in outcomes)


async def test_two_servers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving_http(tmp_path, Parts(max_queue=64)) as server:
        url, page, text = str(server.client.base_url), tmp_path / "page.html", tmp_path / "text.txt"
        text.write_text("a quick brown fox jumps over the lazy dog " * 20)
        flags = [
            f"one={url}",
            f"two={url}",
            "--clients",
            "1",
            "4",
            "--requests",
            "6",
            "--requests-per-client",
            "2",
            "--rounds",
            "2",
        ]
        flags += [
            "--prompt-tokens",
            "4-8",
            "--output-tokens",
            "3-6",
            "--cancelled",
            "0.2",
            "--text",
            str(text),
            "--html",
            str(page),
        ]
        await asyncio.to_thread(sweep.main, flags)
        out = capsys.readouterr().out.splitlines()
        record = json.loads(out[-1])
        assert [(row["clients"], row["round"], row["server"]) for row in record["rows"]] == [
            (clients, number, name) for clients in (1, 4) for number in (0, 1) for name in ("one", "two")
        ]
        for one, two in zip(record["rows"][::2], record["rows"][1::2], strict=True):
            assert one["figures"]["requests"] == two["figures"]["requests"] == max(6, 2 * one["clients"])
            assert one["figures"]["cancelled"] == two["figures"]["cancelled"]
            assert one["figures"]["distinct_experts_per_step"] is None or one["figures"]["tokens_per_step"] >= 1
        header, *rows = (line.split() for line in out[:-1])
        assert header[:3] == ["clients", "server", "tokens/s"]
        assert [row[:2] for row in rows] == [["1", "one"], ["1", "two"], ["4", "one"], ["4", "two"]]
        assert "Median round" in page.read_text()


def test_the_median_round_is_shown() -> None:
    rows = [
        {"clients": 1, "server": "a", "round": n, "figures": {"output_throughput": t}} for n, t in enumerate((5.0, 9.0, 7.0))
    ]
    assert [row["round"] for row in sweep.typical(rows)] == [2]


def test_steps_are_differences_of_counters() -> None:
    before = {"ladimo_step_tokens_sum": 10.0, "ladimo_step_tokens_count": 5.0}
    after = {"ladimo_step_tokens_sum": 40.0, "ladimo_step_tokens_count": 10.0, "ladimo_weight_bytes_total": 4e9}
    figures = step_figures(before, after | {"ladimo_engine_step_seconds_count": 8.0})
    assert figures == {"tokens_per_step": 6.0, "distinct_experts_per_step": None, "gigabytes_per_step": 0.5}
    assert set(step_figures({}, {}).values()) == {None}


async def test_a_command_is_started_waited_for_and_ended() -> None:
    server = parse_server(f"late={sys.executable} -c '{STARTS_LATE}' {{port}}")
    async with running(server) as url:
        assert url.startswith("http://127.0.0.1:")
    with pytest.raises(ValueError, match="ended with exit code 3"):
        async with running(Server("gone", f"{sys.executable} -c 'raise SystemExit(3)' {{port}}")):
            pass
    with pytest.raises(ValueError, match="cannot be started"):
        async with running(Server("none", "/nowhere/at-all {port}")):
            pass
    with pytest.raises(ValueError, match=r"not healthy after 0\.5 s"):
        async with running(Server("deaf", f"{sys.executable} -c 'import time; time.sleep(60)' {{port}}"), 0.5):
            pass


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1", "=http://x", "ours=ladimo-server MODEL"])
def test_what_is_no_server_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main([wrong])
    assert end.value.code == 2
    assert "must be NAME=URL" in capsys.readouterr().err
