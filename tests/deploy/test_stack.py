"""The two ways to start the whole stack: files that fit together, and `observe.sh` as a command."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.grafana.dashboards import DIRECTORY
from tests.deploy.queries import PROMETHEUS, ROOT

DEPLOY = ROOT / "deploy"


def load(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return value


def test_containers_mount_what_is_there_where_it_is_read() -> None:
    services = load(DEPLOY / "compose.yaml")["services"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in services["grafana"]["volumes"])
    assert all((DEPLOY / source).is_dir() for source in mounts)
    (provider,) = load(DEPLOY / "grafana/provisioning/dashboards/ladimo.yml")["providers"]
    assert mounts[f"./{DIRECTORY.relative_to(DEPLOY)}"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DIRECTORY / Path(home).name).exists() and home.startswith(provider["options"]["path"])
    (source,) = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == load(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    (target,) = yaml.safe_load((PROMETHEUS / "targets/compose.yml").read_text())
    assert target["targets"] == ["server:8000"]


def test_grafana_is_the_version_the_dashboards_are_made_for() -> None:
    image = load(DEPLOY / "compose.yaml")["services"]["grafana"]["image"]
    pinned = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "grafana-foundation-sdk" in line]
    assert pinned[0].split("!")[1].split('"')[0] == image.rpartition(":")[2]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
def test_observe_scrapes_a_server_that_is_there_and_ends_with_it(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, server_port = one.getsockname()[1], other.getsockname()[1]
    command = ["deploy/observe.sh", f"127.0.0.1:{server_port}", "sleep", "60"]
    environment = {**os.environ, "PROMETHEUS_PORT": str(port)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            assert run.stdout is not None
            assert any(f"http://127.0.0.1:{port}/alerts" in line for line in iter(run.stdout.readline, "\n\n"))
            deadline = time.monotonic() + 30
            targets: list[dict[str, Any]] = []
            while not targets:
                assert time.monotonic() < deadline
                try:
                    targets = httpx.get(f"http://127.0.0.1:{port}/api/v1/targets").json()["data"]["activeTargets"]
                except (httpx.ConnectError, ValueError):
                    time.sleep(0.1)
            assert targets[0]["scrapeUrl"] == f"http://127.0.0.1:{server_port}/metrics"
            rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
            assert {group["name"] for group in rules} == {"ladimo", "ladimo-objectives"}
        finally:
            os.killpg(run.pid, signal.SIGTERM)
            run.communicate(timeout=30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/-/ready")
