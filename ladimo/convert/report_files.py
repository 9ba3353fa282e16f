"""report.json is the record of a conversion. report.md and report.html are rendered from it alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladimo.checkpoint import read_json, stored_dtype, write_json, write_text
from ladimo.convert.methods.registry import get_method
from ladimo.convert.policies.descriptions import rule_name
from ladimo.convert.policies.frontier import MeasuredPolicies
from ladimo.convert.report.contents import document
from ladimo.convert.report.document import Document
from ladimo.convert.report.markdown import to_markdown
from ladimo.convert.report.page import to_page
from ladimo.convert.report.record import Report
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.policy import RoutingPolicy
from ladimo.prefill import FormCosts, prefill_time_ratio
from ladimo.prefill.measure import measure_form_costs

REPORT = "report.json"
PROFILE = Path("routing/profile.json")  # what `ladimo profile` found for a model that was not converted


def measured_policies(directory: Path) -> list[dict[str, Any]]:
    """The entries of the measured policies of a checkpoint, none if there are none."""
    for file in (directory / REPORT, directory / PROFILE):
        if file.exists():
            entries: list[dict[str, Any]] = read_json(file)["policies"]
            return entries
    return []


def prefill_costs(model: StreamedModel) -> FormCosts | None:
    """What prompts cost on this machine at each number of bits; None for a model of one form."""
    if not model.config.nested_bits:
        return None
    return measure_form_costs(model.config, stored_dtype(model.directory), str(model.device))


def policy_entries(points: MeasuredPolicies, config: ModelConfig, costs: FormCosts | None) -> dict[str, Any]:
    """The keys "policies" and "frontier" of report.json. A policy's entry is that of `ladimo evaluate --json`, with its
    description and rules, and the time of prompts by `costs`."""

    def time_ratio(policy: RoutingPolicy, entry: Mapping[str, Any]) -> float:
        experts = entry["experts_per_token"]
        refined = policy.refined_rows(config, experts, entry.get("bytes_ratio"))
        return prefill_time_ratio(policy, config, experts, refined, costs)

    return {
        "policies": [
            {**entry, "prefill_time_ratio": time_ratio(policy, entry)}
            | {"description": policy.description, "rules": [rule and rule.to_dict() for rule in policy.layers]}
            | {"rule_names": [rule_name(rule, bool(config.nested_bits)) for rule in policy.layers]}
            for entry, policy in zip(points.figures, points.policies, strict=True)
        ],
        "frontier": points.frontier.to_dict(),
    }


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write report.json and the two files that are rendered from it."""
    write_json(directory / REPORT, report)
    render_report(directory)


def render_report(directory: Path, outside: Mapping[str, Any] | None = None) -> None:
    """Render report.md and report.html from report.json. outside: keys to add to report.json first, such as "comparison".

    Raises ValueError with the names of file and field if the record is missing or wrong. Then nothing is changed.
    """
    raw = {**read_json(directory / REPORT), **(outside or {})}
    try:
        said = report_document(raw)
    except ValueError as error:
        raise ValueError(f"{directory / REPORT}: {error}") from error
    if outside:
        write_json(directory / REPORT, raw)
    write_text(directory / "report.md", to_markdown(said))
    write_text(directory / "report.html", to_page(said))


def report_document(raw: Mapping[str, Any]) -> Document:
    """The report of a record as a document. Raises ValueError with the name of the first missing or wrong field."""
    report = Report.from_dict(raw)
    return document(report, get_method(report.method.name).view(report))
