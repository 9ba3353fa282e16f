"""`python -m deploy.helm.chart` writes the generated parts of the chart.

Helm reads only files inside the chart. So the alert rules and dashboards are copied into it. The schema of the values lists the
server's settings, so that Helm refuses a setting that the server does not have.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import create_model

from deploy.grafana import dashboards
from server.settings import ServerSettings

CHART = Path(__file__).parent / "ladimo"
ALERTS = Path(__file__).parents[1] / "prometheus" / "alerts.yml"
SCHEMA = CHART / "values.schema.json"
# The chart sets these from other values, or they make no sense in a pod.
SET_BY_CHART = {
    "model": "model",
    "config": "settings",
    "host": "service",
    "port": "service",
    "api_key": "keys.api",
    "api_key_file": "keys.api",
    "admin_key": "keys.admin",
    "admin_key_file": "keys.admin",
    "insecure_admin": "keys.admin",
    "policies_dir": "policies.volume",
    "shutdown_timeout": "shutdown.drainSeconds",
}


def files() -> dict[Path, str]:
    """The generated files of the chart and their content."""
    boards = {CHART / "files" / "dashboards" / name: text for name, text in dashboards.render().items()}
    return {CHART / "files" / "alerts.yml": ALERTS.read_text(encoding="utf-8"), **boards, SCHEMA: _values_schema()}


def settings_schema() -> dict[str, Any]:
    """JSON schema of the value `settings`: the server's flags without their dashes."""
    fields = {name: field for name, field in ServerSettings.model_fields.items() if name not in SET_BY_CHART}
    tiers = fields.pop("service_tiers")
    model: Any = create_model("Settings", **{name: (field.annotation, field) for name, field in fields.items()})  # type: ignore[call-overload]
    properties = {name.replace("_", "-"): _plain(schema) for name, schema in model.model_json_schema()["properties"].items()}
    properties["service-tiers"] = {"description": tiers.description, "type": "object"}
    return {"type": "object", "additionalProperties": False, "properties": dict(sorted(properties.items()))}


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without its title and default. An option that may be absent is never null in the values."""
    kinds = [each for each in schema.get("anyOf", [{}]) if each.get("type") != "null"]
    given = kinds[0] if len(kinds) == 1 else {"oneOf": kinds}
    return {key: value for key, value in {**schema, **given}.items() if key not in ("anyOf", "title", "default")}


def _values_schema() -> str:
    """The schema of the values: what SCHEMA holds, with the settings as they are now."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
