"""Draws the results of engine_bench: a panel per measure and batch size, a bar per engine or policy.

    python -m loadtests.engine_plot results/HARDWARE/engine_bench_125m.json --out results/HARDWARE/engine_bench_125m.svg

Bars are tokens per second. Bars of other engines are grey. The tooltip of a bar shows its spread.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ladimo.checkpoint import read_json, write_text
from ladimo.convert.report.charts import Axis, Bar, bar_chart, standalone
from loadtests.engine_bench import BUDGET

RIVALS = {
    "transformers generate, dense": "hf",
    "transformers static cache, dense": "hf static",
    "transformers continuous batching, dense": "hf batching",
    "llama.cpp, dense": "llama.cpp",
}
SHORT = {**RIVALS, BUDGET: "shared"}


def plot(record: Mapping[str, Any]) -> str:
    """The content of the SVG file."""
    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in record["results"]:
        panels.setdefault((row["measure"], row["batch"]), []).append(row)
    charts = []
    for (measure, batch), rows in panels.items():
        bars = [Bar(row["tokens_per_second"], _hint(row), row["policy"] in RIVALS) for row in rows]
        names = [(number + 0.5, SHORT.get(row["policy"], row["policy"])) for number, row in enumerate(rows)]
        title = f"{measure}, batch {batch}" if measure == "decode" else f"{measure} of {record['prefill_tokens']} tokens"
        charts.append(bar_chart(title, bars, "", Axis("tokens per second"), names))
    weights = record["quantize"] or record["dtype"]
    return standalone(f"{record['model']}, {weights}, {record['cpu']}, {record['threads']} threads", charts)


def _hint(row: Mapping[str, Any]) -> str:
    spread = f"{row['tokens_per_second']:.1f} tokens/s ({row['lowest']:.1f} to {row['highest']:.1f})"
    ratios = [
        f"{row[field]:.2f} x {name}"
        for field, name in (("ratio_to_llama_cpp", "llama.cpp"), ("ratio_to_transformers", "transformers"))
        if field in row
    ]
    return ", ".join([f"{row['policy']}: {spread}", *ratios])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the JSON line of an engine_bench run, in a file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    record = read_json(args.record)
    if record.get("benchmark") != "engine_bench":
        parser.error(f"{args.record}: is not a record of engine_bench")
    write_text(args.out, plot(record))


if __name__ == "__main__":
    main()
