"""The accuracy of integer weights: perplexity on a text with the stored weights, in int8 and in int4, on a CPU.

    python -m loadtests.accuracy.quantized_accuracy MODEL --text FILE [--policy full] [--tokens 4096]

All three use the compiled step, as the server does. The last line is one JSON object. Ratios are relative to the stored
weights.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.auto import load_tokenizer
from ladimo.checkpoint import load_to_serve, read_config, read_policies
from ladimo.model.inputs import PrefillSegment, RoutingTables, StepInputs, refined_rows
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from loadtests.common.conditions import conditions

BLOCK_SIZE = 16
FORMATS: dict[str, str | None] = {"stored": None, "int8": "int8", "int4": "int4"}


def perplexity(model: MoeTransformer, policy: RoutingPolicy, windows: Tensor) -> tuple[float, float]:
    """The perplexity on N separate windows of tokens [N, S], and the mean number of rows that a token refines."""
    config, length = model.config, windows.shape[1]
    num_blocks = -(-length // BLOCK_SIZE)
    cache = model.backend.allocate_cache(config, num_blocks + 1, BLOCK_SIZE)
    tables = RoutingTables.empty(2, config.num_hidden_layers, config.max_num_experts, "cpu")
    tables.write(1, *policy.to_rows(config.max_num_experts))
    positions, total, refined = torch.arange(length), 0.0, 0
    for window in windows:
        inputs = StepInputs(
            input_ids=window,
            positions=positions,
            policy_ids=torch.ones_like(window),
            slot_mapping=positions + BLOCK_SIZE,  # block 0 is the null block
            block_table=torch.arange(1, num_blocks + 1)[None],
            prefill=(PrefillSegment(0, 0, length, length),),
        )
        output = model.step(inputs, cache, tables)
        total += F.cross_entropy(output.logits[:-1], window[1:], reduction="sum").item()
        counts = output.refined_counts
        refined += 0 if counts is None else int(refined_rows(counts, config.neuron_rows).sum())
    return math.exp(total / windows[:, 1:].numel()), refined / windows.numel()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--policy", default="full")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512, help="tokens that are read together")
    args = parser.parse_args(arguments)
    policies = read_policies(args.model, read_config(args.model))
    if args.policy not in policies:
        parser.error(f"there is no policy {args.policy!r}; there are {', '.join(policies)}")
    ids = load_tokenizer(args.model)(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(args.tokens, len(ids)) // args.window
    if not count:
        parser.error(f"{args.text}: has {len(ids)} tokens, one window is {args.window}")
    windows = torch.tensor(ids[: count * args.window]).view(count, args.window)
    figures: dict[str, dict[str, float]] = {}
    for name, format in FORMATS.items():
        model = load_to_serve(args.model, "cpu", "auto", format)
        if model.backend.name != "native":
            parser.error("there is no compiled step on this machine")
        found, _ = perplexity(model, policies[args.policy], windows)
        stored = figures["stored"]["perplexity"] if figures else found
        figures[name] = {"perplexity": found, "perplexity_ratio": found / stored}
        print(f"{name:<6} perplexity {found:9.4f}  ratio {found / stored:.4f}")
    record = {"benchmark": "quantized_accuracy", "model": str(args.model), "text": str(args.text), "policy": args.policy}
    print(
        json.dumps(
            record
            | {"tokens": windows.numel(), "dtype": str(model.backend.dtype).removeprefix("torch."), "results": figures}
            | conditions()
        )
    )


if __name__ == "__main__":
    main()
