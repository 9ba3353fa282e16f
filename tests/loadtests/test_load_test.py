"""The load test: schedules, plans and figures follow from their arguments; a run against a real server reports all of them."""

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests import load_test
from loadtests.load.arrivals import Arrival, arrivals, burst, constant, ramp, trace
from loadtests.load.client import Client, Outcome
from loadtests.load.figures import Objectives, parse_objectives, percentile, summary, table
from loadtests.load.workload import Lengths, Planned, parse_routing, plan
from tests.server.serving import Parts, serving_http

TEXT = list(range(3, 103))


@settings(max_examples=20)
@given(rate=st.floats(0.1, 50), seconds=st.floats(1, 5), poisson=st.booleans(), seed=st.integers(0, 99))
def test_arrivals_are_in_order_in_time_and_follow_from_the_seed(rate: float, seconds: float, poisson: bool, seed: int) -> None:
    made = arrivals(constant(rate), seconds, seed, poisson)
    times = [arrival.at for arrival in made]
    assert times == sorted(times) and all(0 < at < seconds for at in times)
    assert made == arrivals(constant(rate), seconds, seed, poisson)
    if not poisson:
        assert abs(len(made) - rate * seconds) <= 1


def test_bursts_and_ramps_follow_their_rates() -> None:
    times = [arrival.at for arrival in arrivals(burst(2.0, 10.0, 5.0, 4.0), 15.0, 0, poisson=False)]
    assert sum(5 <= at < 9 for at in times) == pytest.approx(40, abs=1)
    assert sum(at < 5 for at in times) == pytest.approx(10, abs=1)
    times = [arrival.at for arrival in arrivals(ramp(0.0, 20.0, 10.0), 10.0, 0, poisson=False)]
    assert len(times) == pytest.approx(100, abs=1)
    assert sum(at < 5 for at in times) == pytest.approx(25, abs=1)


def test_poisson_gaps_have_the_deviation_of_their_mean() -> None:
    times = [arrival.at for arrival in arrivals(constant(100.0), 30.0, 7, poisson=True)]
    gaps = [late - early for early, late in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.01, rel=0.05)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)


def test_a_trace_gives_times_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:25:50.0,1,1"]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    first, second = trace(path, 60.0, speed=2.0)
    assert (first.at, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.31458 / 2, abs=1e-4)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(ValueError, match="line 2"):
        trace(path, 60.0)


def test_a_plan_follows_from_the_seed_and_fits_the_context() -> None:
    due = [Arrival(0.1 * number) for number in range(200)] + [Arrival(30.0, 5000, 5000)]
    routings = [parse_routing("full=1"), parse_routing("auto:0.3=3")]
    made = plan(due, TEXT, Lengths(2, 20), Lengths(1, 9), routings, 0.25, 64, seed=3)
    assert made == plan(due, TEXT, Lengths(2, 20), Lengths(1, 9), routings, 0.25, 64, seed=3)
    assert all(len(one.prompt) + one.output_tokens < 64 for one in made)
    named = sum(one.routing.name == "full" for one in made)
    assert 30 <= named <= 70
    assert 30 <= sum(one.cancel_after is not None for one in made) <= 70
    assert routings[1].field == {"policy": "auto", "min_accuracy": 0.3}
    with pytest.raises(ValueError, match="too|needs"):
        plan(due, TEXT[:5], Lengths(9, 9), Lengths(1, 1), routings, 0.0, 64, seed=3)


def test_answers_are_never_cut_unless_a_trace_gives_their_length() -> None:
    routings = [parse_routing("full")]
    (made,) = plan([Arrival(0.0)], TEXT, Lengths(4, 4), Lengths(50, 50), routings, 0.0, 64, seed=3)
    assert (len(made.prompt), made.output_tokens) == (4, 50)
    with pytest.raises(ValueError, match="up to 64 tokens, but the context has room for 63"):
        plan([Arrival(0.0)], TEXT, Lengths(4, 14), Lengths(50, 50), routings, 0.0, 64, seed=3)


def outcome(due: float, ttft: float, gap: float, tokens: int = 11, **fields: object) -> Outcome:
    made = Outcome("default", due, due, due + ttft, due + ttft + gap * (tokens - 1), [gap] * (tokens - 1), 20, tokens, 200)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_figures_are_those_of_the_definitions() -> None:
    outcomes = [
        outcome(0.0, 0.1, 0.01, accuracy=1.0, reason="auto", policy="full"),
        outcome(1.0, 0.3, 0.01, accuracy=0.4, reason="auto", policy="fast"),
        outcome(2.0, 0.1, 0.05, accuracy=0.4, reason="body", policy="fast"),
        outcome(3.0, 0.1, 0.01, status=429, code="queue_full"),
        outcome(4.0, 0.1, 0.01, cancelled=True),
    ]
    figures = summary(outcomes, parse_objectives(["ttft:200", "tpot:20"]))
    assert (figures["requests"], figures["completed"], figures["cancelled"]) == (5, 3, 1)
    assert figures["errors"] == {"queue_full": 1}
    assert figures["good_share"] == 1 / 4
    assert figures["mean_ttft_ms"] == pytest.approx(500 / 3)
    assert (figures["p90_ttft_ms"], figures["p50_tpot_ms"]) == (pytest.approx(300), pytest.approx(10))
    assert figures["mean_itl_ms"] == pytest.approx(70 / 3)
    assert figures["p99_e2el_ms"] == pytest.approx(600)
    assert figures["output_throughput"] == pytest.approx(33 / 4.2)
    assert figures["mean_accuracy"] == pytest.approx(0.6)
    assert figures["degraded_share"] == 1 / 3
    assert summary(outcomes, Objectives(), 1.0, 3.0)["requests"] == 2
    rows = {row[0]: row for row in table(figures, {**figures, "mean_ttft_ms": 50.0})}
    assert rows["mean_ttft_ms"][1:] == ["166.667", "50.000", "3.33"]


def test_nothing_completed_has_no_latencies() -> None:
    figures = summary([outcome(0.0, 0.1, 0.01, status=429, code="queue_full")], Objectives())
    assert figures["p90_ttft_ms"] is None and figures["good_share"] == 0.0
    assert all(isinstance(cell, str) for row in table(figures) for cell in row)
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0


@pytest.mark.parametrize("wrong", ["ttft", "speed:3", "ttft:soon"])
def test_objectives_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="must be ttft:MS"):
        parse_objectives([wrong])


async def test_a_run_reports_everything_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving_http(tmp_path, Parts(max_queue=64)) as server:
        text = tmp_path / "text.txt"
        text.write_text("a quick brown fox jumps over the lazy dog " * 20)
        flags = [str(server.client.base_url), "--rate", "20", "--peak", "60", "--peak-from", "0.5", "--peak-seconds", "0.5"]
        flags += ["--seconds", "1.5", "--poisson", "--prompt-tokens", "4-8", "--output-tokens", "3-9", "--cancelled", "0.2"]
        flags += ["--routing", "full=1", "--routing", "auto:0.5=1", "--routing", "default=1", "--text", str(text)]
        flags += ["--goodput", "ttft:5000", "e2el:9000", "--json", str(tmp_path / "one.json"), "--seed", "5"]
        await asyncio.to_thread(load_test.main, flags)
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        figures = record["figures"]
        assert figures["requests"] == figures["completed"] + figures["cancelled"] > 20
        assert figures["cancelled"] > 0 and figures["errors"] == {}
        assert figures["good_share"] > 0.5 and figures["mean_accuracy"] == 1.0
        assert 0 < record["burst_figures"]["requests"] < figures["requests"]
        assert record["knob"][0]["policy"] == "full"
        assert record["conditions"]["seed"] == 5
        page = tmp_path / "page.html"
        await asyncio.to_thread(
            load_test.main,
            [*flags, "--name", "again", "--compare", str(tmp_path / "one.json"), "--html", str(page), "--plot", f"{page}.svg"],
        )
        out = capsys.readouterr().out
        again = json.loads(out.splitlines()[-1])
        assert again["figures"]["requests"] == figures["requests"]  # the same seed asks the same
        assert re.search(r"^p90_ttft_ms +\S+ +\S+ +\d+\.\d\d$", out, re.M)
        html = page.read_text()
        assert Path(f"{page}.svg").read_text().startswith("<svg")
        assert (
            html.count("<svg") == 5
            and "again" in html
            and "http://" not in html.replace("http://www.w3.org", "").replace(str(server.client.base_url), "")
        )
        await server.idle()


async def test_errors_of_other_servers_are_counted() -> None:
    """Their codes may be numbers, and connections may break."""

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["seed"]:
            raise httpx.RemoteProtocolError("closed")
        return httpx.Response(503, json={"error": {"code": 503}})

    routing = parse_routing("default=1")
    planned = [Planned(0.0, TEXT, 4, routing, None, seed) for seed in (0, 1)]
    async with httpx.AsyncClient(base_url="http://other", transport=httpx.MockTransport(answer)) as http:
        outcomes = await Client(http).run_closed(planned, clients=2)
    assert summary(outcomes, Objectives())["errors"] == {"503": 1, "RemoteProtocolError": 1}


@pytest.mark.parametrize("seeded", [True, False])
async def test_requests_can_be_without_a_seed(seeded: bool) -> None:
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(503, json={"error": {"code": 503}})

    planned = [Planned(0.0, TEXT, 4, parse_routing("default=1"), None, 7)]
    async with httpx.AsyncClient(base_url="http://other", transport=httpx.MockTransport(answer)) as http:
        await Client(http, seeded=seeded).run_closed(planned, clients=1)
    assert [body.get("seed") for body in bodies] == [7 if seeded else None]


def test_a_server_that_is_not_there_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_test.main(["http://127.0.0.1:9", "--seconds", "1"])
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
