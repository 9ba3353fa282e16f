"""The settings of the deployment, and how many replicas it asks for."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deploy.ray.app import build
from deploy.ray.autoscaling import PRESSURE, desired_replicas, objective_pressure
from deploy.ray.config import DeploymentConfig

EXAMPLE = Path(__file__).parents[3] / "deploy" / "ray" / "serve.yaml"


def test_the_server_s_settings_are_those_of_ladimo_server(moe_dir: Path) -> None:
    config = DeploymentConfig(model=str(moe_dir), server={"max-num-seqs": 3, "admin_key": "secret"})
    settings = config.settings()
    assert settings.model == str(moe_dir) and settings.max_num_seqs == 3 and settings.admin_key is not None


def test_a_relative_directory_becomes_absolute_and_a_hub_id_stays(moe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(moe_dir.parent)
    assert DeploymentConfig(model=moe_dir.name).model == str(moe_dir)
    assert DeploymentConfig(model="some/model").model == "some/model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replica": 2}, "replica\n"),
        ({"replicas": 0}, "replicas\n"),
        ({"replicas": 2, "autoscaling": {}}, "replicas and autoscaling exclude each other"),
        ({"server": {"max_seqs": 1}}, "server: there is no setting 'max_seqs'"),
        ({"server": {"max_num_seqs": 0}}, "--max-num-seqs"),
        ({"server": {"port": 80}}, "server.port cannot be set here: Ray Serve's HTTP options set it"),
        ({"server": {"insecure-admin": True}}, "server.insecure-admin cannot be set here: set admin_key"),
        ({"server": {"policies_dir": "x"}}, "server.policies_dir cannot be set here"),
    ],
)
def test_what_cannot_be_set_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeploymentConfig(model="some/model", **fields)


def test_without_ray_serve_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'ladimo\[ray\]'"):
        build(DeploymentConfig(model="some/model"))


@pytest.mark.long  # the import of Ray Serve takes seconds
def test_the_example_is_an_application_of_ray_serve() -> None:
    """In a process of its own, because ray starts threads."""
    program = f"""
import yaml
from ray.serve.schema import ServeDeploySchema
from deploy.ray.app import build
from deploy.ray.config import DeploymentConfig
schema = ServeDeploySchema.model_validate(yaml.safe_load(open({str(EXAMPLE)!r})))
(application,) = schema.applications
assert application.import_path == "deploy.ray.app:build"
args = dict(application.args)
args["server"] = dict(args["server"])
del args["server"]["admin-key-file"]
deployment = build(DeploymentConfig(**args))._bound_deployment
assert deployment.name == "Gateway"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_s_settings_exist(tmp_path: Path) -> None:
    (application,) = yaml.safe_load(EXAMPLE.read_text())["applications"]
    key = tmp_path / "key"
    key.write_text("secret\n")
    args = application["args"]
    assert "admin-key-file" in args["server"]
    config = DeploymentConfig(**{**args, "server": {**args["server"], "admin-key-file": str(key)}})
    assert config.autoscaling == {"min_replicas": 2, "max_replicas": 8}


def context(requests: float, *pressures: float) -> Any:
    metrics = {PRESSURE: dict(enumerate(pressures))} if pressures else None
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 8)
    return SimpleNamespace(total_num_requests=requests, aggregated_metrics=metrics, config=config)


@pytest.mark.parametrize(
    ("requests", "pressures", "replicas"),
    [(0, (), 0), (40, (), 5), (4, (0.5, 0.7), 1.2), (4, (2.0, 1.5), 3.5), (40, (1.0, 1.0), 5)],
)
def test_the_larger_need_decides(requests: float, pressures: tuple[float, ...], replicas: float) -> None:
    assert desired_replicas(context(requests, *pressures)) == (replicas, {})


def test_accuracy_given_up_counts_as_load() -> None:
    assert objective_pressure(None, lambda accuracy: accuracy) == 0
    status: dict[str, Any] = {"signals": {"itl": 0.9, "queue": 0.2}, "accuracy": 0.5}
    assert objective_pressure(status, lambda accuracy: accuracy) == pytest.approx(1.8)
    assert objective_pressure({**status, "accuracy": 1.0}, lambda accuracy: accuracy) == pytest.approx(0.9)
    assert objective_pressure({"signals": {}, "accuracy": 1.0}, lambda accuracy: 1.0) == 0
