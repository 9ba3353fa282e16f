"""Prometheus's files: valid, tested by promtool, and each alert explained in the runbook."""

import re
import shutil
import subprocess

import pytest
import yaml

from server.api.services import SCRAPE_SECONDS
from tests.deploy.queries import PROMETHEUS, ROOT, rules

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


@needs_promtool
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "tests.yml")]
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    result = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_scrape_of_a_stuck_engine_is_in_time() -> None:
    """Its answer takes SCRAPE_SECONDS; were that the scrape's timeout, the alert could never see the sequences that wait."""
    interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert float(interval.removesuffix("s")) > 2 * SCRAPE_SECONDS


def test_every_alert_fires_and_is_silent_in_the_tests() -> None:
    fired, silent = set(), set()
    for group in yaml.safe_load((PROMETHEUS / "tests.yml").read_text())["tests"]:
        instances = {
            instance for series in group["input_series"] for instance in re.findall(r'instance="(\w+)"', series["series"])
        }
        layers = {layer for series in group["input_series"] for layer in re.findall(r'layer="(\w+)"', series["series"])}
        for test in group["alert_rule_test"]:
            expected = test["exp_alerts"]
            if expected:
                fired.add(test["alertname"])
            if not expected or len(expected) < max(len(instances), len(layers)):
                silent.add(test["alertname"])
    assert fired == silent == {rule["alert"] for rule in rules() if "alert" in rule}


def test_every_alert_has_its_section_in_the_runbook() -> None:
    sections = set()
    for rule in rules():
        if "alert" in rule:
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert anchor == rule["alert"].lower()
            headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
            assert rule["alert"] in headings
            sections.add(page)
    (page,) = sections
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(headings) == {rule["alert"] for rule in rules() if "alert" in rule}
