"""`python -m deploy.metrics_page` writes METRICS.md from the metrics that the code declares."""

import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry

from server.metrics import Declaration, Metrics

PAGE = Path(__file__).parent / "METRICS.md"
HEAD = """# Metrics

Made from the code by `python -m deploy.metrics_page`; do not edit.

`GET /metrics` serves these and prometheus_client's `process_*` and `python_*` metrics. Units are seconds, tokens, and shares
from 0 to 1. Counters count from the start of the process. `policy` is the policy a request ran under. Layers and experts count
from 0, and only layers with experts are exported. "As of the last step" means that a figure stands still while the engine does.

`ladimo_expert_tokens_total` has one series for each policy, layer, and expert that a version of the policy may choose there: of
those that its rule names in `experts`, all, or the first `top_k` in a layer without a router. What a policy leaves out on
purpose has no series and counts neither as unused nor as uneven. In a large model these are many series. By default
(`--expert-metrics auto`) they are exported if the experts of all layers times the policies at the start are at most 5000;
`full` always exports them, `aggregate` never. The figures per layer (imbalance, entropy, unused experts) are always exported.
"""


def declarations() -> list[Declaration]:
    return Metrics(CollectorRegistry(), {}, lambda experts: 1.0).declarations


def render(metrics: Iterable[Declaration]) -> str:
    metrics = list(metrics)
    rows = "".join(
        f"| `{metric.name}` | {metric.type} | {', '.join(f'`{label}`' for label in metric.labels)} | {_escape(metric.help)} |\n"
        for metric in metrics
    )
    buckets = "".join(
        f"- `{metric.name}`: {' '.join(f'{bound:g}' for bound in metric.buckets)}\n" for metric in metrics if metric.buckets
    )
    return f"{HEAD}\n| name | type | labels | meaning |\n| --- | --- | --- | --- |\n{rows}\n## Buckets\n\n{buckets}"


def _escape(text: str) -> str:
    return re.sub(r"([|<>])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(render(declarations()), encoding="utf-8")
