"""The report's section on the conditions of the measurements."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ladimo.convert.report.document import Fold, Section, Table
from ladimo.convert.report.record import Report
from ladimo.convert.report.words import duration, source_name


def conditions_section(report: Report) -> Section:
    conditions, source = report.conditions, report.source
    text = conditions.text
    names = text if isinstance(text, str) else ", ".join(Path(file.path).name for file in text)
    counts = ", ".join(f"{count:,} {split}" for split, count in conditions.tokens.items())
    converted = ", ".join(str(layer.layer) for layer in report.layers if layer.converted)
    lines = [
        report.method.description,
        f"Source: {source_name(report)} (SHA-256 {source.sha256[:12]}). Converted layers: {converted or 'none'}.",
        f"Text: {names}. Tokens: {counts}. {conditions.note}".strip(),
        f"Perplexity: {conditions.protocol}",
        f"Measured in {conditions.dtype} on {conditions.device}; fitting took {duration(conditions.training_seconds)}.",
    ]
    profiled = conditions.profiled
    if profiled is not None:
        lines.append(
            f"Policies were profiled again on {Path(profiled.text.path).name} ({profiled.tokens['profile']:,} tokens, "
            f"{profiled.tokens['evaluation']:,} to evaluate); policies, frontier and the source's perplexity are on it."
        )
    recipe = [[name, str(value)] for name, value in _flat(report.recipe)]
    return Section("Conditions", lines, [Fold("The whole recipe", [Table(["key", "value"], recipe)])])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
