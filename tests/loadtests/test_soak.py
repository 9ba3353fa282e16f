"""The soak test: everything at once against a real engine, exact counts, and checks that find what they are for."""

import json
from pathlib import Path

import httpx
import pytest

from loadtests import soak
from loadtests.soak import FLAGS, Plan, log_check, memory_check
from loadtests.soaking.ledger import HIDDEN, LEFT, Answer, Counters, Ledger, at_rest
from server.app import Access
from tests.factories import make_moe
from tests.server.real import serving_model

KINDS = {"completion", "routed", "chat", "responses", "phases", "structured", "tools", "scored", "stopped", "deadline"}
KINDS |= {"wrong", "left", "plain"}
CONTEXT = 1024  # a token is a byte, and the description of a tool has hundreds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("soak") / "model", max_position_embeddings=CONTEXT)


async def test_mixed_traffic_leaves_nothing_behind_and_every_count_is_exact(model: Path) -> None:
    plan = Plan(seconds=3.0, clients=8, longest=24, pause=0.1, rest=0.01, memory_mib=1000)
    async with (
        serving_model(model, *FLAGS, access=Access(open_admin=True)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        ledger, checks = await soak.soak(http, plan)
        default = (await http.get("/v1/routing")).json()
    assert [check for check in checks if not check.passed] == []
    assert set(ledger.kinds) <= KINDS and len(ledger.kinds) >= 9, "on a busy machine, some kinds may not have had their turn"
    assert ledger.left and ledger.swaps
    assert len({reason for _, _, reason in ledger.requests}) >= 3
    assert (default["default"]["policy"], default["canary"]) == ("full", None)


@pytest.mark.long
def test_two_minutes_as_a_command(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        soak.main([str(model), "--seconds", "120", "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert end.value.code == 0, record["checks"]
    assert sum(record["requests"].values()) > 500


PAGE = """
ladimo_policy_requests_total{requested="default",served="full",reason="default"} REQUESTS
ladimo_policy_requests_total{requested="soak-left",served="soak-left",reason="body"} 3
ladimo_request_success_total{finish_reason="length",policy="full"} 2
ladimo_request_success_total{finish_reason="abort",policy="soak-left"} ABORTED
ladimo_prompt_tokens_total{policy="full"} 10
ladimo_generation_tokens_total{policy="full"} TOKENS
ladimo_generation_tokens_total{policy="soak-hidden"} 9
ladimo_generation_tokens_total{policy="soak-left"} 70
ladimo_request_failures_total{code="unknown_policy"} 1
ladimo_request_failures_total{code="queue_full"} REFUSED
ladimo_request_failures_total{code="client_disconnected"} 5
ladimo_admission_rejections_total{reason="queue_full"} REFUSED
ladimo_policy_swaps_total{result="ok"} 4
ladimo_requests_in_flight 0
ladimo_kv_cache_usage_ratio USED
"""


def page(**values: float) -> Counters:
    text = PAGE
    for name, value in {"requests": 2, "aborted": 3, "tokens": 7, "refused": 1, "used": 0, **values}.items():
        text = text.replace(name.upper(), str(value))
    return Counters(text)


def ledger() -> Ledger:
    seen = Ledger(swaps=4, left=4, unsure=1)
    full = {"policy": "full", "reason": "default"}
    seen.answered(Answer("default", full, ["length"], 5, 3))
    seen.answered(Answer("default", {**full, "phases": [{"policy": "full", "completion_tokens": 4}]}, ["length"], 5, 4))
    seen.failures["unknown_policy",] = 1
    return seen


def failed(**values: float) -> list[str]:
    return [check.name for check in ledger().checks(Counters(""), page(**values)) if not check.passed]


def test_equal_counts_pass() -> None:
    assert {HIDDEN, LEFT} == {"soak-hidden", "soak-left"}
    assert failed() == []
    assert failed(refused=0) == []  # who left without a status need not have been refused


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"requests": 3}, ["requests by what was asked, policy and reason"]),
        ({"tokens": 6}, ["generated tokens by policy"]),
        ({"tokens": 8}, ["generated tokens by policy"]),
        ({"aborted": 2}, ["requests of clients that left"]),
        ({"refused": 2}, ["errors by code", "refusals by reason"]),
    ],
)
def test_one_too_many_or_too_few_is_found(values: dict[str, float], names: list[str]) -> None:
    assert failed(**values) == names


def test_what_is_left_is_found() -> None:
    assert at_rest(page()).passed
    assert at_rest(page(used=0.1)).found == "kv_cache_usage_ratio 0.1"


def test_memory_that_grows_after_the_warm_up_is_found() -> None:
    warms_up = [(float(at), min(100.0 + 10 * at, 400)) for at in range(90)]
    grows = [(float(at), 100.0 + at) for at in range(90)]
    assert memory_check(warms_up, 90, 24).passed
    assert not memory_check(grows, 90, 24).passed
    assert not memory_check([], 90, 24).passed


def test_errors_and_tracebacks_in_the_log_are_found() -> None:
    fine = '{"level": "info", "message": "an error of a client"}\n{"level": "warning", "message": "slow"}\n'
    assert log_check(fine).passed
    assert not log_check(fine + '{"level": "error", "message": "a request failed"}\n').passed
    assert not log_check(fine + "Traceback (most recent call last):\n").passed
