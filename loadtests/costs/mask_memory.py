"""Memory and operations of a training step of methods tomoe and disp, by calculation from a model's shape.

    python -m loadtests.costs.mask_memory [--shape llama-2-7b] [--recipe ladimo/recipes/tomoe-published.toml] [--tflops 300]

The activations are those that the backward pass needs. A test counts them in real steps, and finds every byte. They are most in
the first steps, in which each neuron has a mask of its own; attention is whole. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ladimo.convert.methods.masks.hypernetwork import WIDTH, Hypernetwork
from ladimo.convert.methods.masks.recipe import DispRecipe, MaskRecipe, TomoeRecipe
from ladimo.convert.recipe import Recipe, load_recipe
from ladimo.model.config import ModelConfig
from ladimo.model.families import read_model_config
from loadtests.common.models import SHAPES

FP32 = 4
ADAMW = 16  # bytes per parameter: the weight, its gradient and two moments
LOGITS = 4  # tensors of logits in fp32 at the end of a step: the dense model's, the masked one's, and two for its gradient


def activation_bytes(config: ModelConfig, options: MaskRecipe, experts: int, tokens: int, itemsize: int) -> dict[str, int]:
    """What the masked model keeps for the backward pass, by part. tokens: of a step. itemsize: bytes of a number in the model's
    dtype. All FFNs are masked.

    No gradient passes through the first layer's attention, because its inputs have none.
    """
    depth, neurons, hidden = config.num_hidden_layers, config.intermediate_size, config.hidden_size
    later, routed = depth - 1, experts > 1
    # What a mask multiplies: the product of both branches, or each branch, and then also the results. In later layers also the
    # activation's input, the branches, and the mask if tokens have different ones.
    every, more = (1, 3) if options.mask_once else (4, 1)
    noise = options.token_noise and routed
    inner = tokens * neurons * (itemsize * (depth * every + later * (more + routed)) + FP32 * depth * noise)
    rows = tokens if noise else experts
    heads = depth * rows * (WIDTH * (3 if noise else 2) + 2) * FP32
    masks = 0 if noise else depth * experts * neurons * (1 + routed) * FP32
    if not routed and (itemsize < FP32 or not options.soft):  # one mask for all tokens, in the model's dtype
        masks += (later if options.mask_once else depth) * neurons * itemsize
    routing = depth * (2 * tokens * experts + experts + tokens * hidden) * FP32 if routed else 0
    norms = (2 * later + 1) * tokens * (hidden + 1) * FP32
    width = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    attention = later * tokens * (width * itemsize + config.num_attention_heads * FP32)
    rotary = 2 * tokens * config.rotary_dim * itemsize
    return {
        "inner activations of FFNs and their masks": inner,
        "heads of the hypernetwork, routers": heads + masks + routing,
        "norms": norms,
        "attention": attention + rotary,
        "log-probabilities": tokens * config.vocab_size * FP32,
    }


def memory(config: ModelConfig, options: MaskRecipe, experts: int, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes of a training, by part."""
    with torch.device("meta"):
        hypernetwork = Hypernetwork(config.hidden_size, [config.intermediate_size] * config.num_hidden_layers, experts, 0)
    trained = sum(weight.numel() for weight in hypernetwork.parameters())
    embedding = config.head_parameters * (1 if config.tie_word_embeddings else 2)
    parts = activation_bytes(config, options, experts, tokens, itemsize)
    del parts["log-probabilities"]
    return {
        "frozen weights": (config.dense_parameters + embedding) * itemsize,
        "hypernetwork with AdamW": trained * ADAMW,
        **parts,
        "logits and their gradients": LOGITS * tokens * config.vocab_size * FP32,
    }


def operations(config: ModelConfig, tokens: int, length: int, distilled: bool) -> float:
    """Of a step: the masked model forward and back to the inputs of each layer, and the dense model forward."""
    passes = 3 if distilled else 2
    causal = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length  # half of 2 x length, twice
    return 2.0 * passes * tokens * (config.dense_parameters + config.head_parameters + causal)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--recipe", type=Path, metavar="FILE.toml", help="of method tomoe or disp (default: that of tomoe)")
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of a number in the model's dtype (default: bf16)")
    parser.add_argument("--tflops", type=float, default=300.0, help="that the device reaches (default: %(default)s)")
    args = parser.parse_args(arguments)
    recipe = load_recipe(args.recipe) if args.recipe else Recipe().override({"method": "tomoe"})
    kinds: dict[str, type[MaskRecipe]] = {"tomoe": TomoeRecipe, "disp": DispRecipe}
    if recipe.method not in kinds:
        parser.error(f"--recipe: is for method {recipe.method!r}, not tomoe or disp")
    options = recipe.section(kinds[recipe.method])
    config = read_model_config({**SHAPES[args.shape], "model_type": "llama"})
    length = min(2048, config.max_position_embeddings)
    tokens = max(1, options.batch_tokens // length) * length
    parts = memory(config, options, recipe.split.experts if recipe.method == "tomoe" else 1, tokens, args.itemsize)
    needed = operations(config, tokens, length, bool(options.distill))
    for name, size in {**parts, "together": sum(parts.values())}.items():
        print(f"| {name} | {size / 1e9:.2f} GB |")
    seconds = needed / args.tflops / 1e12
    print(f"| operations of a step of {tokens:,} tokens | {needed:.2e}, {seconds:.2f} s at {args.tflops:g} TFLOP/s |")
    print(json.dumps({"benchmark": "mask_memory", "shape": args.shape, "bytes": parts, "operations": needed, "tokens": tokens}))


if __name__ == "__main__":
    main()
