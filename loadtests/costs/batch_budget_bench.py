"""Speed and accuracy of a decoding batch under a shared budget of experts (`batch_experts` of a policy), on a CPU.

    python -m loadtests.costs.batch_budget_bench MODEL [--text FILE] [--policy full] [--batch 8] [--budgets 2,3,4,6]

The sequences of the batch are pieces of the text. Each step reads the next token of each piece, as if it had been drawn. So all
rows of the table predict the same tokens after the same history. The rows are the policy itself, the policy with each budget,
and for comparison top_k 1, which also reads fewer experts. Rounds are interleaved, and the speed is the median of the ratios
per round. The default text is Python's standard library. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import load_to_serve, read_config, read_policies
from ladimo.convert.data.calibration import Encoder, calibrate, evaluation_blocks
from ladimo.model.inputs import RoutingTables, StepInputs
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.runs import mean, mean_distinct

BLOCK_SIZE = 16
WITHOUT = "no budget"


@dataclass(frozen=True)
class Run:
    """One pass: nats per token, mean number of different experts per expert layer and step, seconds per step."""

    loss: float
    distinct: float | None
    step_seconds: float


def variants(policy: RoutingPolicy, budgets: Sequence[int]) -> dict[str, RoutingPolicy]:
    def changed(name: str, **values: Any) -> RoutingPolicy:
        layers = tuple(None if rule is None else dataclasses.replace(rule, **values) for rule in policy.layers)
        return RoutingPolicy(name, "", layers)

    limited = {f"budget {budget}": changed(f"budget-{budget}", batch_experts=budget) for budget in budgets}
    return {WITHOUT: policy, **limited, "top_k 1": changed("top-1", top_k=1)}


def decode(model: MoeTransformer, policy: RoutingPolicy, tokens: Tensor) -> Run:
    """Decode B sequences `tokens` [B, S] in one batch, one token of each per step."""
    config, (rows, length) = model.config, tokens.shape
    per_row = -(-length // BLOCK_SIZE)
    cache = model.backend.allocate_cache(config, rows * per_row + 1, BLOCK_SIZE)
    tables = RoutingTables.empty(2, config.num_hidden_layers, config.max_num_experts, "cpu", batch_budgets=True)
    tables.write(1, *policy.to_rows(config.max_num_experts))
    first = torch.arange(rows) * per_row + 1  # block 0 is the null block
    block_table = first[:, None] + torch.arange(per_row)
    loss, seconds = 0.0, []
    for position in range(length - 1):
        inputs = StepInputs(
            input_ids=tokens[:, position].contiguous(),
            positions=torch.full((rows,), position),
            policy_ids=torch.ones(rows, dtype=torch.int64),
            slot_mapping=first * BLOCK_SIZE + position,
            block_table=block_table,
            num_decode=rows,
        )
        started = time.perf_counter()
        logits, expert_ids, _ = model.step(inputs, cache, tables)
        seconds.append(time.perf_counter() - started)
        assert expert_ids is not None
        tables.record(expert_ids, inputs.policy_ids)
        loss += F.cross_entropy(logits, tokens[:, position + 1], reduction="sum").item()
    counts = tables.distinct_experts.tolist()
    steps = [counts[index] for index in config.moe_layer_indices]
    distinct = mean(mean_distinct([[0] * len(layer) for layer in steps], steps))
    return Run(loss / (rows * (length - 1)), distinct, statistics.median(seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted checkpoint with a router")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--policy", default="full")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--budgets", default="2,3,4,6")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(arguments)
    config = read_config(args.model)
    policies = read_policies(args.model, config)
    if args.policy not in policies:
        parser.error(f"there is no policy {args.policy!r}; there are {', '.join(policies)}")
    encoder, wanted = Encoder(args.model, config), args.batch * args.length
    blocks = calibrate(encoder, 5 * wanted, 0, None).evaluation if args.text is None else None
    if blocks is None:
        blocks = evaluation_blocks(encoder, args.text, wanted)
    if blocks.numel() < wanted:
        parser.error(f"the text has {blocks.numel()} tokens, the batch takes {wanted}")
    tokens = blocks.flatten()[:wanted].view(args.batch, args.length)
    model = load_to_serve(args.model, "cpu", args.dtype)
    if model.backend.name != "native":
        parser.error("there is no compiled step on this machine")
    rows = variants(policies[args.policy], [int(budget) for budget in args.budgets.split(",")])
    decode(model, policies[args.policy], tokens[:, :16])  # warm
    samples: dict[str, list[Run]] = {name: [] for name in rows}
    other, started = OtherLoad(), time.perf_counter()
    for _ in range(args.rounds):
        for name, policy in rows.items():
            samples[name].append(decode(model, policy, tokens))
    busy = other.cores(time.perf_counter() - started)
    results = []
    print(f"{'':<10} {'distinct':>9} {'perplexity':>11} {'ratio':>7} {'ms a step':>10} {'speed':>6}")
    for name, runs in samples.items():
        ratios = [free.step_seconds / run.step_seconds for free, run in zip(samples[WITHOUT], runs, strict=True)]
        row: dict[str, Any] = {
            "policy": name,
            "distinct_experts_per_step": runs[0].distinct,
            "perplexity": math.exp(runs[0].loss),
            "perplexity_ratio": math.exp(runs[0].loss - samples[WITHOUT][0].loss),
            "step_seconds": statistics.median(run.step_seconds for run in runs),
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_spread": [min(ratios), max(ratios)],
        }
        print(
            f"{name:<10} {row['distinct_experts_per_step'] or 0.0:9.2f} {row['perplexity']:11.3f} "
            f"{row['perplexity_ratio']:7.4f} {1000 * row['step_seconds']:10.3f} {row['speed_ratio']:6.3f}"
        )
        results.append(row)
    record = {"benchmark": "batch_budget_bench", "model": str(args.model), "policy": args.policy, "batch": args.batch}
    record |= {"length": args.length, "rounds": args.rounds, "dtype": str(model.backend.dtype).removeprefix("torch.")}
    print(json.dumps(record | {"other_load_cores": busy, "results": results} | conditions()))


if __name__ == "__main__":
    main()
