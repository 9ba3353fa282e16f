"""`python -m deploy.metrics_page` writes METRICS.md from the metrics that the code declares."""

import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry

from server.exposition import Declaration
from server.metrics import Metrics

PAGE = Path(__file__).parent / "METRICS.md"
HEAD = """# Metrics

Made from the code by `python -m deploy.metrics_page`; do not edit.

`GET /metrics` serves these metrics, and the `process_*` and `python_*` metrics of prometheus_client. Times are in seconds,
shares are from 0 to 1. Counters count from the start of the process. `policy` is the policy that a request ran under. Layers
and experts are numbered from 0. Only layers with experts are exported. A figure "at the last step" does not change while the
engine runs no steps.

`ladimo_expert_tokens_total` has one series for each policy, layer, and expert that the policy may choose there. An expert that
the policy's mask excludes has no series, and figures of balance ignore it. A large model has many of these series.
`--expert-metrics auto`, the default, exports them if the model's experts times its policies are at most 5000 at the start.
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
