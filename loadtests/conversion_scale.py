"""Time and memory of a conversion with the shapes of a real model and random weights. Both depend on shapes only.

    python -m loadtests.conversion_scale [--shape llama-2-7b] [--layers N] [--tokens 100000] [--recipe FILE] [--device auto]

--layers makes the run shorter. A conversion has one layer in memory at a time, so its peak memory does not depend on the number
of layers, and its time is proportional to it. The last line is one JSON object with the total seconds and the peak memory of
the device. On a CPU it is the peak of the process, which includes the hidden states on the host.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ladimo.checkpoint import choose_device, read_config, write_json, write_tensors
from ladimo.convert.pipeline import convert
from ladimo.convert.recipe import Recipe, load_recipe
from ladimo.convert.source import model_parameters
from loadtests.common.conditions import conditions
from loadtests.common.models import SHAPES


def write_random_dense(directory: Path, shape: dict[str, Any]) -> None:
    """Write a dense checkpoint in bf16 with normally distributed weights, and a byte tokenizer padded with unused tokens."""
    write_json(directory / "config.json", {**shape, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    generator = torch.Generator().manual_seed(0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model_parameters(read_config(directory)):
            if parameter.ndim == 1:
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                yield name, (torch.randn(parameter.shape, generator=generator) * 0.02).bfloat16()

    write_tensors(directory, weights())
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"<unused {number}>" for number in range(shape["vocab_size"] - len(symbols))]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="number of layers (default: the shape's)")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--method", default="elastic")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE.toml", help="other values of the conversion (default: the usual recipe)"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    shape = {**SHAPES[args.shape]}
    shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
    device = choose_device(args.device)
    recipe = load_recipe(args.recipe) if args.recipe else Recipe()
    with TemporaryDirectory() as temporary:
        dense, out = Path(temporary) / "dense", Path(temporary) / "moe"
        dense.mkdir()
        write_random_dense(dense, shape)
        written = _peak_bytes(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.monotonic()
        convert(str(dense), out, recipe.override({"method": args.method, "tokens": args.tokens}), None, args.device)
        seconds = time.monotonic() - started
    peak, layers = _peak_bytes(device), shape["num_hidden_layers"]
    print(f"{layers} layers of {args.shape} in {seconds:.0f} s, {seconds / layers:.1f} s a layer; peak {peak / 2**30:.1f} GiB")
    record = {"benchmark": "conversion_scale", "shape": args.shape, "layers": layers, "method": args.method}
    record |= {
        "recipe": args.recipe and str(args.recipe),
        "tokens": args.tokens,
        "device": str(device),
        "seconds": seconds,
        "peak_bytes": peak,
    }
    print(json.dumps({**record, "peak_bytes_before": written, **conditions()}))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
