"""report.json is the record of a conversion; report.md and report.html are rendered from it alone."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ladimo.checkpoint import read_json, write_json, write_text
from ladimo.convert.charts import bar_chart, line_chart
from ladimo.convert.operating_points import OperatingPoints, rule_name

REPORT = "report.json"

Table = tuple[list[str], list[list[str]]]  # header, rows

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}svg{margin:.3rem;border:1px solid #eee}"""


def policy_entries(points: OperatingPoints) -> dict[str, Any]:
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


def render_report(directory: Path) -> None:
    """report.md and report.html from report.json. Raises ValueError when it is missing or lacks a field."""
    report = read_json(directory / REPORT)
    try:
        markdown, html = to_markdown(report), to_html(report)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{directory / REPORT}: missing or wrong field: {error}") from error
    write_text(directory / "report.md", markdown)
    write_text(directory / "report.html", html)


def to_markdown(report: dict[str, Any]) -> str:
    parts = [f"# {report['model']}: conversion report", *_prose(report)]
    for title, (header, rows) in _tables(report).items():
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts += [f"## {title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def to_html(report: dict[str, Any]) -> str:
    title = f"{report['model']}: conversion report"
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in _prose(report))]
    body += ["<div>", _frontier_chart(report), _curves_chart(report), "</div>"]
    for heading, (header, rows) in _tables(report).items():
        body += [f"<h2>{escape(heading)}</h2>", _html_table(header, rows)]
    body.append("<h2>Routing weights and load</h2>")
    for layer in report["layers"]:
        body += ["<div>", *_profile_charts(layer, report), "</div>"]
    page = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{page}\n</body></html>\n"
    )


def _prose(report: dict[str, Any]) -> list[str]:
    conditions, source = report["conditions"], report["source"]
    converted = [layer["layer"] for layer in report["layers"] if layer["converted"]]
    tokens = ", ".join(f"{count:,} {split}" for split, count in conditions["tokens"].items())
    text = conditions["text"]
    names = text if isinstance(text, str) else ", ".join(Path(file["path"]).name for file in text)
    lines = [
        report["method"]["description"],
        f"Source: {source['name']} (SHA-256 {source['sha256'][:12]}), perplexity "
        f"{source['perplexity']:.3f} on the evaluation text.",
        f"Converted: {len(converted)} of {report['num_hidden_layers']} layers ({', '.join(map(str, converted))}).",
        f"Text: {names}. Tokens: {tokens}. {conditions['note']}".strip(),
        f"Perplexity: {conditions['protocol']}",
        f"Measured in {conditions['dtype']} on {conditions['device']}; training took {conditions['training_seconds']:.0f} s.",
    ]
    if "profiled" in conditions:
        profiled = conditions["profiled"]
        lines.append(
            f"Policies were profiled again on {Path(profiled['text']['path']).name} ({profiled['tokens']['profile']:,} tokens, "
            f"{profiled['tokens']['evaluation']:,} to evaluate); the figures below and the source's perplexity are on it."
        )
    return lines


def _tables(report: dict[str, Any]) -> dict[str, Table]:
    frontier = [point["policy"] for point in report["frontier"]["points"]]
    policies = [
        [
            entry["policy"],
            f"{100 * entry['active_parameters_ratio']:.1f}%",
            f"{entry['perplexity']:.3f}",
            f"{entry['perplexity_ratio']:.3f}",
            f"{100 * entry['next_token_agreement']:.1f}%",
            f"{entry['kl']:.4f}",
            "yes" if entry["policy"] in frontier else "no",
            entry["description"],
        ]
        for entry in report["policies"]
    ]
    rules = [[entry["policy"], *(f"{name}" for name in entry["rule_names"])] for entry in report["policies"]]
    experts = [
        [entry["policy"], *("dense" if count is None else f"{count:.2f}" for count in entry["experts_per_token"])]
        for entry in report["policies"]
    ]
    dense = report["holdout_dense_perplexity"]
    layers = [
        [
            str(layer["layer"]),
            "yes" if layer["converted"] else "no",
            f"{layer['initial_error']:.3f}",
            f"{layer['error']:.3f}",
            f"{layer['converted_alone_perplexity'] / dense:.4f}",
            f"{layer['profile']['mean_best_weight']:.3f}",
            f"{layer['profile']['kept_error']:.3f}",
            f"{layer['profile']['one_error']:.3f}",
            f"{max(layer['profile']['load']) * len(layer['profile']['load']):.2f}",
        ]
        for layer in report["layers"]
    ]
    header = ["layer", *(str(index) for index in range(report["num_hidden_layers"]))]
    return {
        "Policies": (
            ["policy", "active parameters", "perplexity", "to dense", "same next token", "KL (nats)", "on frontier", "rules"],
            policies,
        ),
        "Layers: holdout error over the variance of the FFN's output, perplexity ratio with only that layer converted": (
            ["layer", "converted", "error before", "error after", "perplexity ratio", "best weight", "TOP1 error, own weight",
             "TOP1 error, weight 1", "busiest expert / even"],
            layers,
        ),
        "Rule per layer": (header, rules),
        "Experts per token": (header, experts),
    }  # fmt: skip


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _frontier_chart(report: dict[str, Any]) -> str:
    points = report["frontier"]["points"]
    curve = [(100 * point["active_parameters_ratio"], point["perplexity_ratio"]) for point in points]
    labels = [point["policy"] for point in points]
    return line_chart("Frontier", {"frontier": curve}, "active parameters, %", "perplexity / dense", labels)


def _curves_chart(report: dict[str, Any]) -> str:
    curves = {}
    for layer in report["layers"]:
        trained = [(float(point["step"]), point["holdout"]) for point in layer["curve"]]
        curves[f"layer {layer['layer']}"] = [(0.0, layer["initial_error"]), *trained]
    return line_chart("Holdout error of each layer in training", curves, "step", "error / variance")


def _profile_charts(layer: dict[str, Any], report: dict[str, Any]) -> list[str]:
    index, profile = layer["layer"], layer["profile"]
    rules = {entry["policy"]: entry["rule_names"][index] for entry in report["policies"]}
    named = "stays dense"
    if layer["converted"]:
        named = ", ".join(f"{name} {rules[name]}" for name in ("quality", "balanced", "fast"))
    last = str(len(profile["load"]) - 1)
    return [
        bar_chart(f"Layer {index}, best expert's weight: {named}", profile["histogram"], ("0", "1"), "tokens"),
        bar_chart(f"Layer {index}, load per expert", profile["load"], ("0", last), "share"),
    ]
