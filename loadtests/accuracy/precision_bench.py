"""Bits against accuracy: a nested model's policies beside plain int8 and int4, and beside llama.cpp's formats.

    python -m loadtests.accuracy.precision_bench DENSE NESTED --text FILE [--tokens 8192] [--gguf FILE [--exported FILE ...]]

All rows see the same windows of the text. Ours are computed by the compiled step, as the server computes them. The cost of a
row is the bytes of weights that a decoded token reads, output head included, relative to 16 bits. `--gguf` names an unrounded
GGUF file of the dense model (`ladimo export --target gguf --policy full`). llama.cpp rounds it to its own formats and runs
these. `--exported` names GGUF files with our integers (`ladimo export --target gguf` of the nested model), which llama.cpp runs
as they are. All ratios of llama.cpp are to its own run of the unrounded file. The last line is one JSON object.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.auto import load_tokenizer
from ladimo.checkpoint import load_to_serve, read_config, read_policies
from ladimo.model.precision import GROUP
from ladimo.policy import RoutingPolicy
from loadtests.accuracy.quantized_accuracy import perplexity
from loadtests.common.conditions import conditions

Row = tuple[str, float, float]  # name, bytes relative to 16 bits, perplexity
SCALE_BITS = 32  # of the plain integer formats
# llama.cpp's numbers of its file types.
LLAMA_CPP_FORMATS = {"Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15}


def nested_rows(directory: Path, windows: Tensor) -> Iterator[Row]:
    """The policies of a nested checkpoint. Those that read most bits come first. Their bytes are those on this text."""
    config = read_config(directory)

    def cost(policy: RoutingPolicy, refined_rows: float) -> float:
        experts = tuple(None if rule is None else float(rule.top_k) for rule in policy.layers)
        ratio = policy.bytes_ratio(config, experts, refined_rows)
        if ratio is None:
            raise SystemExit(f"{directory}: has no nested weights")
        return ratio

    policies = sorted(read_policies(directory, config).values(), key=lambda policy: -cost(policy, 0.0))
    model = load_to_serve(directory, "cpu")
    for policy in policies:
        found, refined_rows = perplexity(model, policy, windows)
        yield policy.name, cost(policy, refined_rows), found


def plain_rows(directory: Path, windows: Tensor) -> Iterator[Row]:
    """The dense checkpoint in one integer format for everything, rounded to the nearest."""
    config = read_config(directory)
    dense = RoutingPolicy("dense", "", (None,) * config.num_hidden_layers)
    for bits in (8, 4):
        model = load_to_serve(directory, "cpu", "auto", f"int{bits}")
        yield f"int{bits}", (bits + SCALE_BITS / GROUP) / 16, perplexity(model, dense, windows)[0]


def read_ratio(gguf: Path) -> float:
    """The bytes of a file's weights that a decoded token reads, relative to 16 bits. Of an embedding beside the output head it
    reads one row."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return float(sum(tensor.n_bytes for tensor in tensors.values()) / sum(2 * tensor.n_elements for tensor in tensors.values()))


def llama_cpp_rows(gguf: Path, exported: Sequence[Path], windows: Tensor, threads: int) -> Iterator[Row]:
    """The unrounded file first."""
    import llama_cpp as library

    from loadtests.common.llama_cpp_peer import LlamaCpp

    def run(name: str, file: Path) -> Row:
        peer, total = LlamaCpp(file, threads, 1, windows.shape[1]), 0.0
        for window in windows:
            logits = peer.logits(window.tolist())
            total += F.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
        return name, read_ratio(file), math.exp(total / windows[:, 1:].numel())

    yield run("llama.cpp, unrounded", gguf)
    with tempfile.TemporaryDirectory() as directory:
        for name, number in LLAMA_CPP_FORMATS.items():
            target, params = Path(directory) / f"{name}.gguf", library.llama_model_quantize_default_params()
            params.ftype, params.nthread = number, threads
            if library.llama_model_quantize(str(gguf).encode(), str(target).encode(), params):
                raise SystemExit(f"llama.cpp could not write {name}")
            yield run(f"llama.cpp {name}", target)
    for file in exported:
        yield run(f"exported {file.parent.name if file.stem == 'model' else file.stem}", file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("nested", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512, help="tokens that are read together")
    parser.add_argument("--gguf", type=Path, help="needs llama-cpp-python")
    parser.add_argument("--exported", type=Path, nargs="+", default=[], help="our GGUF files of the nested model; needs --gguf")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    args = parser.parse_args(arguments)
    if args.exported and args.gguf is None:
        parser.error("--exported: needs --gguf, the unrounded file to compare with")
    ids = load_tokenizer(args.dense)(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(args.tokens, len(ids)) // args.window
    if not count:
        parser.error(f"{args.text}: has {len(ids)} tokens, one window is {args.window}")
    windows = torch.tensor(ids[: count * args.window]).view(count, args.window)
    parts = [nested_rows(args.nested, windows), plain_rows(args.dense, windows)]
    if args.gguf is not None:
        parts.append(llama_cpp_rows(args.gguf, args.exported, windows, args.threads))
    results = []
    print(f"{'weights':<22} {'bytes':>6} {'perplexity':>11} {'ratio':>7}")
    base = math.nan
    for part in parts:
        for name, cost, found in part:
            if name in ("full", "llama.cpp, unrounded"):
                base = found
            results.append({"weights": name, "bytes_ratio": cost, "perplexity": found, "perplexity_ratio": found / base})
            print(f"{name:<22} {100 * cost:5.1f}% {found:11.4f} {found / base:7.4f}", flush=True)
    record = {"benchmark": "precision_bench", "dense": str(args.dense), "nested": str(args.nested), "text": args.text.name}
    print(json.dumps(record | {"tokens": windows.numel(), "window": args.window, "results": results} | conditions()))


if __name__ == "__main__":
    main()
