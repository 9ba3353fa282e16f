"""report.json is the record of a conversion; report.md and report.html are rendered from it alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladimo.checkpoint import read_json, write_json, write_text
from ladimo.convert.policies.frontier import MeasuredPolicies, rule_name
from ladimo.convert.report.page import to_markdown, to_page
from ladimo.convert.report.sections import document

REPORT = "report.json"


def policy_entries(points: MeasuredPolicies) -> dict[str, Any]:
    """The keys "policies" and "frontier" of report.json. A policy's entry is that of `ladimo evaluate --json` with its
    description and rules."""
    return {
        "policies": [
            {**entry, "description": policy.description, "rules": [rule and rule.to_dict() for rule in policy.layers]}
            | {"rule_names": [rule_name(rule) for rule in policy.layers]}
            for entry, policy in zip(points.figures, points.policies, strict=True)
        ],
        "frontier": points.frontier.to_dict(),
    }


def write_report(directory: Path, report: dict[str, Any]) -> None:
    write_json(directory / REPORT, report)
    render_report(directory)


def render_report(directory: Path, outside: Mapping[str, Any] | None = None) -> None:
    """report.md and report.html from report.json; outside: keys to put into it first, such as "comparison".

    Raises ValueError when it is missing or lacks a field, and then changes nothing.
    """
    report = {**read_json(directory / REPORT), **(outside or {})}
    try:
        said = document(report)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{directory / REPORT}: missing or wrong field: {error}") from error
    if outside:
        write_json(directory / REPORT, report)
    write_text(directory / "report.md", to_markdown(said))
    write_text(directory / "report.html", to_page(said))
