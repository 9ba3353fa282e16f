"""The dashboards are those of the code, and every query reads what the server exports."""

import json

import pytest

from deploy.grafana.dashboards import DIRECTORY, OBJECTIVES, SERVER_ERRORS, render
from server.errors import statuses
from tests.deploy.queries import Query, bounds, complaints, dashboard_queries, rule_queries


def test_dashboards_are_made_from_the_code() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in DIRECTORY.iterdir()}
    assert on_disk == render(), "run python -m deploy.grafana.dashboards"


@pytest.mark.parametrize("query", [*dashboard_queries(), *rule_queries()], ids=lambda query: query.where)
def test_query_reads_what_is_exported(query: Query) -> None:
    assert complaints(query.expr) == []


@pytest.mark.parametrize(
    "expr",
    [
        "ladimo_no_such_metric",
        'ladimo_requests_running{policy="fast"}',
        "sum by (expert) (ladimo_requests_running)",
        'rate(ladimo_inter_token_latency_seconds_bucket{le="0.17"}[1m])',
        "ladimo_inter_token_latency_seconds",
        "1 - (sum (ladimo_expert_tokens_total) / sum (rate(ladimo_expert_tokens[5m])))",
    ],
)
def test_the_check_finds_mistakes(expr: str) -> None:
    assert complaints(expr)


def test_panels_do_not_overlap_and_have_a_place() -> None:
    for text in render().values():
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(text)["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken
            assert at["x"] + at["w"] <= 24
            taken |= cells


def test_objectives_on_offer_are_bounds_of_buckets() -> None:
    assert {float(bound) for bound in OBJECTIVES["ttft_objective"]} <= bounds()["ladimo_time_to_first_token_seconds"]
    assert {float(bound) for bound in OBJECTIVES["itl_objective"]} <= bounds()["ladimo_inter_token_latency_seconds"]


def test_server_errors_are_those_of_the_error_tree() -> None:
    """5xx, but for what happens on purpose."""
    codes = {code for code, status in statuses().items() if status >= 500} - {"loading", "draining"}
    assert set(SERVER_ERRORS.split('"')[1].split("|")) == codes
    (alert,) = [query.expr for query in rule_queries() if query.where == "LadimoErrorShare"]
    assert alert.count(SERVER_ERRORS) == 2
