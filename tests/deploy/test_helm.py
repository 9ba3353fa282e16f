"""The Helm chart, rendered by Helm itself: valid manifests that agree with the server, its metrics and its settings.

Kubernetes's own kinds are checked against its schemas. The schemas of the Prometheus operator and of KEDA are not at hand, so
their kinds are only checked for what they refer to.
"""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute

from deploy.helm.chart import CHART, SET_BY_CHART, files
from server.api.http.middleware import OPEN_PATHS
from server.api.routes import ops
from server.launch import CLOSE_SECONDS
from server.settings import ServerSettings, read_settings
from tests.deploy.queries import PROMETHEUS, ROOT, complaints

helm = pytest.importorskip("helm_python", reason="there is no helm-python-sdk for this platform")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

KUBERNETES = ("1.25", "1.37")  # the oldest that the chart admits, and a new one
OPERATORS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
# As a file of values is read, numbers are floats for Helm.
EVERYTHING = """
replicaCount: 3
image: {repository: registry.example/ladimo, tag: cuda, pullPolicy: Always}
imagePullSecrets: [{name: pull}]
model: {volume: {nfs: {server: nfs.example, path: /models}}, subPath: demo}
settings:
  served-model-name: demo
  max-num-seqs: 64
  tensor-parallel-size: 2
  max-body-bytes: 16777216
  accuracy: 0.5
  prefix-caching: false
  allow-origin: [https://a.example, https://b.example]
  service-tiers: {flex: {policy: fast, priority: 10}}
  log-level: WARNING
keys: {api: {secret: users, key: keys.txt}, admin: {secret: operators}}
shutdown: {preStopSeconds: 15, drainSeconds: 120}
startup: {seconds: 1801}
resources: {limits: {nvidia.com/gpu: 1, memory: 64Gi}, requests: {cpu: "8"}}
service: {type: LoadBalancer, port: 8080, annotations: {a.example/b: c}}
serviceAccountName: ladimo
podAnnotations: {a.example/b: c}
podLabels: {team: a}
priorityClassName: high
runtimeClassName: nvidia
nodeSelector: {gpu: h100}
tolerations: [{key: nvidia.com/gpu, operator: Exists}]
affinity: {podAntiAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}}
topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: ScheduleAnyway}]
extraEnv: [{name: OTEL_SERVICE_NAME, value: ladimo}]
podDisruptionBudget: {maxUnavailable: 50%}
networkPolicy:
  from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: apps}}}]
  egress: [{to: [{podSelector: {}}], ports: [{port: 4318}]}]
autoscaling: {enabled: true, maxReplicas: 8}
monitoring:
  labels: {release: prometheus}
  serviceMonitor: {enabled: true}
  rules: {enabled: true}
  dashboards: {enabled: true}
"""
(EXAMPLE,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "kubernetes.md").read_text(), flags=re.DOTALL | re.MULTILINE)
POLICIES = "policies: {volume: {persistentVolumeClaim: {claimName: policies}}}"
VALUES = {"defaults": "{}", "everything": EVERYTHING, "policies": POLICIES, "example": EXAMPLE}


@cache
def render(values: str, release: str = "ladimo") -> dict[str, dict[str, Any]]:
    """The manifests by kind, as `helm template` would write them."""
    with helm.Chart.load(CHART) as chart:
        texts = chart.render(helm.values_from_yaml(values), name=release, namespace="apps")
    manifests = [yaml.safe_load(text) for path, text in texts.items() if path.endswith(".yaml")]
    return {manifest["kind"]: manifest for manifest in manifests if manifest}


def server(manifests: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and its container."""
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


@pytest.mark.parametrize("path", sorted(files()), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == files()[path], "run python -m deploy.helm.chart"


def test_generated_files_are_all_that_there_are() -> None:
    assert {path for path in (CHART / "files").rglob("*") if path.is_file()} == {p for p in files() if "files" in p.parts}


def test_helm_finds_no_fault() -> None:
    report = helm.lint(CHART, helm.values_from_yaml(EVERYTHING), strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_kubernetes_accepts_the_manifests(values: str) -> None:
    manifests = render(values)
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= set(manifests)
    assert ({*OPERATORS, "ConfigMap"} <= set(manifests)) == (values in (EVERYTHING, EXAMPLE))
    for manifest in manifests.values():
        if manifest["kind"] not in OPERATORS:
            for version in KUBERNETES if values == EVERYTHING else KUBERNETES[1:]:
                kubernetes_validate.validate(manifest, version, strict=True)
        assert set(manifest) <= {"apiVersion", "kind", "metadata", "spec", "data"}
    sources = [volume.keys() - {"name"} for volume in server(manifests)[0]["volumes"]]
    assert {len(each) for each in sources} == {1}  # the API server refuses a volume with two


def test_the_check_of_manifests_sees_a_wrong_name() -> None:
    manifest = deepcopy(render("{}")["Deployment"])
    manifest["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES[1], strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_probes_and_ports_are_the_server_s(values: str) -> None:
    manifests = render(values)
    _, container = server(manifests)
    (port,) = container["ports"]
    assert environment(container)["LADIMO_PORT"] == str(port["containerPort"])
    routes = {route.path for route in ops.router.routes if isinstance(route, APIRoute)}
    for probe, path in {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}.items():
        request = container[f"{probe}Probe"]["httpGet"]
        assert request == {"path": path, "port": port["name"]}
        assert path in routes & OPEN_PATHS
    (service_port,) = manifests["Service"]["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    (rule,) = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert [each["port"] for each in rule["ports"]] == [port["name"]]
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = (
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    )
    assert all(selector and selector.items() <= labels.items() for selector in selectors)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_grace_period_holds_the_pre_stop_and_the_drain(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pod, container = server(render(values))
    for name, value in environment(container).items():
        if not name.endswith("_FILE"):
            monkeypatch.setenv(name, value)
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    least = int(seconds) + read_settings([]).shutdown_timeout + CLOSE_SECONDS
    assert least < pod["terminationGracePeriodSeconds"] <= least + 10


def test_the_default_drain_is_the_server_s_own() -> None:
    _, container = server(render("{}"))
    assert float(environment(container)["LADIMO_SHUTDOWN_TIMEOUT"]) == ServerSettings.model_fields["shutdown_timeout"].default


def test_startup_has_at_least_the_seconds_that_are_asked_for() -> None:
    _, container = server(render(EVERYTHING))
    probe = container["startupProbe"]
    assert 1801 <= probe["failureThreshold"] * probe["periodSeconds"] < 1810


def test_the_server_reads_the_settings_that_the_chart_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod, container = server(render(EVERYTHING))
    variables = environment(container)
    (keys,) = [volume["projected"]["sources"] for volume in pod["volumes"] if volume["name"] == "keys"]
    paths = {item["path"]: (source["secret"]["name"], item["key"]) for source in keys for item in source["secret"]["items"]}
    assert paths == {"api": ("users", "keys.txt"), "admin": ("operators", "admin-key")}
    for name in ("LADIMO_API_KEY_FILE", "LADIMO_ADMIN_KEY_FILE"):
        mounted = Path(variables[name])
        assert str(mounted.parent) in {mount["mountPath"] for mount in container["volumeMounts"]} and mounted.name in paths
        variables[name] = str(tmp_path / mounted.name)
        Path(variables[name]).write_text(f"{mounted.name}-secret\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = read_settings([])
    assert (settings.model, settings.host, settings.port, settings.shutdown_timeout) == ("/model", "0.0.0.0", 8000, 120)
    assert (settings.max_num_seqs, settings.max_body_bytes, settings.accuracy) == (64, 16777216, 0.5)
    assert (settings.prefix_caching, settings.log_level, settings.served_model_name) == (False, "WARNING", "demo")
    assert settings.allow_origin == ["https://a.example", "https://b.example"]
    assert settings.service_tiers is not None and settings.service_tiers["flex"].priority == 10
    assert [key.get_secret_value() for key in settings.api_key] == ["api-secret"]
    assert settings.admin_key is not None and settings.admin_key.get_secret_value() == "admin-secret"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("replicas: 2", "replicas"),
        ("settings: {max-seqs: 2}", "max-seqs"),
        ("settings: {max_num_seqs: 2}", "max_num_seqs"),
        ("settings: {max-num-seqs: 0}", "max-num-seqs"),
        ("settings: {accuracy: most}", "accuracy"),
        ("settings: {port: 80}", "port"),
        ("monitoring: {rules: true}", "rules"),
        ("model: {claim: null}", "model.claim"),
        ("autoscaling: {slowShare: 2}", "slowShare"),
        (f"{POLICIES}\nreplicaCount: 2", "policies.volume"),
        (f"{POLICIES}\nautoscaling: {{enabled: true}}", "policies.volume"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: str, complaint: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(complaint)):
        render(values)


def test_a_setting_is_either_free_or_set_by_another_value() -> None:
    with helm.Chart.load(CHART) as chart:
        known = chart.values
    assert set(SET_BY_CHART) < set(ServerSettings.model_fields)
    for value in SET_BY_CHART.values():
        at = known
        for part in value.split("."):
            at = at[part]


def test_policies_on_disk_are_used_by_one_server_at_a_time() -> None:
    deployment = render(POLICIES)["Deployment"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    pod, container = server(render(POLICIES))
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["policies"] == environment(container)["LADIMO_POLICIES_DIR"]
    assert {"name": "policies", "persistentVolumeClaim": {"claimName": "policies"}} in pod["volumes"]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_server_has_no_rights_and_writes_to_volumes_only(values: str) -> None:
    pod, container = server(render(values))
    assert pod["securityContext"]["runAsNonRoot"]
    user = str(pod["securityContext"]["runAsUser"])
    assert re.search(rf"useradd .*--uid {user}\b", (ROOT / "Dockerfile").read_text())
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/tmp"]["name"] == "scratch" and mounts["/model"]["readOnly"]
    assert ("/dev/shm" in mounts) == ("LADIMO_TENSOR_PARALLEL_SIZE" in environment(container))
    assert set(mounts) - {"/dev/shm"} == {"/tmp", "/model"} | {
        place for place in mounts if place.startswith(("/etc/", "/var/"))
    }


def test_prometheus_finds_the_server_under_the_job_that_alerts_and_dashboards_read() -> None:
    manifests = render(EVERYTHING, release="prod")
    service, monitor = manifests["Service"], manifests["ServiceMonitor"]
    assert service["metadata"]["name"] == "prod-ladimo"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] in {route.path for route in ops.router.routes if isinstance(route, APIRoute)}
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "ladimo"}]
    assert 'up{job="ladimo"}' in (PROMETHEUS / "alerts.yml").read_text()
    assert manifests["PrometheusRule"]["spec"] == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    assert {kind for kind in manifests if manifests[kind]["metadata"]["labels"].get("release") == "prometheus"} == {
        "ServiceMonitor",
        "PrometheusRule",
    }
    boards = {path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert {name: text.strip() for name, text in manifests["ConfigMap"]["data"].items()} == {
        name: text.strip() for name, text in boards.items()
    }


def test_autoscaling_reads_metrics_that_the_server_exports() -> None:
    manifests = render(EVERYTHING, release="prod")
    scaled = manifests["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert "replicas" not in manifests["Deployment"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (1, 8)
    triggers = {trigger["name"]: trigger for trigger in scaled["triggers"]}
    assert {name: trigger["metricType"] for name, trigger in triggers.items()} == {
        "queue": "AverageValue",
        "first-token": "Value",
        "gap": "Value",
    }
    # The Prometheus operator adds both labels.
    where = f'namespace="apps",service="{manifests["Service"]["metadata"]["name"]}"'
    for trigger in triggers.values():
        query = trigger["metadata"]["query"]
        selectors = re.findall(r"\{(.*?)\}", query)
        assert selectors and all(where in selector for selector in selectors)
        assert complaints(query.replace(where, 'job="ladimo"')) == []
        assert float(trigger["metadata"]["threshold"]) > 0
