"""Compiles the kernels of the GPU suite without a GPU, into a directory for Triton's cache, so that a rented GPU need not wait.

    python -m loadtests.gpu.precompile CACHE [--shape llama-2-7b] [--only experts,dense,nested,int8,int4] [--batches 1,8,32]

It takes minutes on two cores. Then, on the GPU machine, with the same release of Triton and the same sources:

    TRITON_CACHE_DIR=CACHE python -m loadtests.gpu_suite --out DIR

One layer is enough, because all layers have the same kernels. Tensors have no values (device "meta").
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.backends.triton_backend import TritonBackend
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import RoutingTables, StepInputs
from ladimo.model.precision import NESTED_BITS
from ladimo.model.quantization.layers import quantize_model
from ladimo.model.transformer import MoeTransformer
from ladimo.prefill.random_weights import nest_randomly
from loadtests.common.models import SHAPES, dense_config, partitioned_config
from loadtests.gpu.kernel_compile import compile_only

META, DTYPE = torch.device("meta"), torch.bfloat16
KINDS = ("experts", "dense", "nested", "int8", "int4")
BLOCK_SIZE, NUM_BLOCKS, NUM_POLICIES = 16, 1000, 20
PROMPTS = (128, 1024, 4096)
# Tokens of a sequence in the suite's sections. The width of a block table says among how many programs attention is divided.
LENGTHS = (169, 177, 209, 273, 401)


def config_of(kind: str, shape: str) -> ModelConfig:
    """One layer of the model that the suite measures."""
    if kind == "dense":
        config = dense_config(shape)
    elif kind == "nested":
        config = partitioned_config(shape, num_experts=1)
        layer: Any = replace(config.layers[0], router="none")  # type: ignore[type-var]
        config = replace(config, layers=(layer,), nested_bits=NESTED_BITS)
    else:
        config = partitioned_config(shape)
    return replace(config, num_hidden_layers=1, layers=config.layers[:1])


def empty_model(kind: str, shape: str) -> MoeTransformer:
    """A model without values, laid out as the engine does it."""
    config = config_of(kind, shape)
    with META:
        model = MoeTransformer(config).to(DTYPE)
    model.rotary.materialise(META)
    model.requires_grad_(False)
    if kind == "nested":
        nest_randomly(model)
    elif kind in ("int8", "int4"):
        quantize_model(model, kind)
    backend = TritonBackend(META, DTYPE)
    backend.prepare(model)
    backend.lay_out(model)
    return model


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=META)


def decode_inputs(rows: int, length: int) -> StepInputs:
    each = integers(5, rows)
    table = integers(rows, -(-length // BLOCK_SIZE))
    return StepInputs(each[0], each[1], each[2], slot_mapping=each[3], block_table=table, context_lens=each[4], num_decode=rows)


@torch.inference_mode()
def launch_all(model: MoeTransformer, batches: Sequence[int]) -> None:
    """Launch the kernels of decode steps and of prompts."""
    config, backend = model.config, model.backend
    tables = RoutingTables.empty(NUM_POLICIES, 1, config.max_num_experts, META)
    shape = (1, NUM_BLOCKS, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    cache = KVCache(*(torch.empty(shape, dtype=DTYPE, device=META) for _ in range(2)))
    steps = [(decode_inputs(rows, length), cache) for rows in batches for length in LENGTHS]
    for inputs, used in [*steps, *((StepInputs.whole_sequences(integers(1, tokens), 1), None) for tokens in PROMPTS)]:
        out = model(inputs, used, tables)
        if out.expert_ids is not None:
            backend.record(tables, out.expert_ids, inputs.policy_ids)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--batches", default="1,8,32,64,256")
    parser.add_argument("--capability", type=int, default=90)
    args = parser.parse_args(arguments)
    kinds, batches = args.only.split(","), [int(batch) for batch in args.batches.split(",")]
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--only {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so Triton interprets kernels instead of compiling them")
    knobs.cache.dir = str(args.cache.resolve())
    seen: set[str] = set()

    def report(name: str, constants: dict[str, Any], kernel: Any) -> None:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(f"{len(seen):4d} {name}", flush=True)

    with compile_only(args.capability, report):
        for kind in kinds:
            launch_all(empty_model(kind, args.shape), batches)
    print(f"{len(seen)} kernels in {args.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
