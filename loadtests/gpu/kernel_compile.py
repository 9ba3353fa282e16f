"""Compiles the kernels to machine code for a GPU, on a machine without a GPU, and prints the resources that they need.

    python -m loadtests.gpu.kernel_compile [--capability 90] [--few]

Prints one JSON line per compiled kernel: shared memory, registers per thread, spilled bytes. It does not work with
TRITON_INTERPRET=1, because Triton then interprets kernels instead of compiling them.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from ladimo.model.config import MoeLayerConfig
from ladimo.model.kernels import attention, experts, linear, norm_activation, routing
from ladimo.model.kernels.nested import experts as nested_experts
from ladimo.model.kernels.nested import head as nested_head
from ladimo.model.kernels.nested import linear as nested_linear
from ladimo.model.nested.plane_layout import BLOCK_COLUMNS, WORDS, DownWeights, NeuronRows
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.quantization import GROUP, QuantizedWeights, Weights, find_format
from ladimo.model.rule import RuleNumber

INTEGERS: tuple[str, ...] = ("int8", "int4")


class AbsentGPU(DriverBase):  # type: ignore[misc]
    """Stands in for the GPU's driver. It answers the compiler's questions about the device."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def compile_only(capability: int, compiled: Callable[[str, dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside this context, a launch compiles the kernel and passes (name, constants, kernel) to `compiled`. Nothing runs."""
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled(self.__name__, {k: v for k, v in kwargs.items() if isinstance(v, (int, bool))}, kernel)
        return kernel

    triton.runtime.driver.set_active(AbsentGPU(capability))
    with patch.object(JITFunction, "run", compile_instead):
        yield


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_weights(*shape: int, format: str | None = None) -> Weights:
    """Weights without values, as `format` stores them; None: in bf16. `quantize_weights` would take seconds for the same."""
    if format is None:
        return meta(*shape)
    *lead, cols = shape
    parts = 8 // find_format(format).bits
    padded = triton.cdiv(cols, GROUP * parts) * GROUP * parts
    data = meta(*lead, padded // parts, dtype=torch.int8)
    return QuantizedWeights(data, meta(*lead, padded // GROUP, dtype=torch.float32), cols, find_format(format))


def launch_experts(
    num_tokens: int, hidden_size: int = 4096, size: int = 1376, num_experts: int = 8, format: str | None = None
) -> None:
    experts.apply_experts(
        meta(num_tokens, hidden_size),
        meta(num_tokens, num_experts, dtype=torch.float32),
        meta(num_tokens, num_experts, dtype=torch.int64),
        meta_weights(num_experts, 2 * size, hidden_size, format=format),
        meta_weights(num_experts, hidden_size, size, format=format),
    )


def launch_linear(num_rows: int, format: str, num_inputs: int = 4096, num_outputs: int = 4096, bias: bool = False) -> None:
    weights = meta_weights(num_outputs, num_inputs, format=format)
    assert isinstance(weights, QuantizedWeights)
    linear.linear(meta(num_rows, num_inputs), weights, meta(num_outputs) if bias else None)


def meta_plane(*shape: int) -> QuantizedWeights:
    """A plane of nested weights without values, in words."""
    *lead, cols = shape
    blocks = triton.cdiv(cols, BLOCK_COLUMNS)
    data = meta(*lead, blocks * BLOCK_COLUMNS // 8, dtype=torch.int32)
    return QuantizedWeights(data, meta(*lead, blocks * BLOCK_COLUMNS // GROUP), cols, WORDS)


def meta_nested(*shape: int) -> NestedWeights:
    return NestedWeights(meta(*shape), meta_plane(*shape), meta_plane(*shape))


def launch_nested(num_tokens: int, hidden_size: int = 4096, size: int = 11008, num_words: int = 32000) -> None:
    """A linear layer, an FFN with a gate and one without, and the output head."""
    x, bits = meta(num_tokens, hidden_size), meta(num_tokens, dtype=torch.float32)
    nested_linear.linear(x, meta_nested(hidden_size, hidden_size), bits)
    rows = meta(1, triton.cdiv(size, GROUP) * GROUP, hidden_size // 2, dtype=torch.int8)
    neurons = NeuronRows(rows, meta(1, triton.cdiv(size, GROUP), hidden_size))
    down = meta_nested(1, hidden_size, size)
    for gated in (True, False):
        nested_experts.apply_nested(
            x,
            meta(num_tokens, 1, dtype=torch.float32),
            meta(num_tokens, 1, dtype=torch.int64),
            meta_nested(1, (2 if gated else 1) * size, hidden_size),
            DownWeights(down.full, down.high, down.low, neurons),
            meta(1, size, dtype=torch.float32),
            bits,
            bits,
            None if gated else meta(1, size),
        )
    nested_head.logits(x, meta_nested(num_words, hidden_size), bits, bits)


def launch_routing(num_tokens: int, num_experts: int, layer: MoeLayerConfig, bias: bool = False) -> None:
    rows = meta(num_tokens, len(RuleNumber), dtype=torch.float32)
    allowed = meta(num_tokens, num_experts, dtype=torch.bool)
    weights, ids = routing.select_experts(
        meta(num_tokens, num_experts), rows, allowed, layer, meta(num_experts, dtype=torch.float32) if bias else None
    )
    routing.apply_batch_budget(weights, ids, rows, allowed, num_tokens)
    routing.record(
        ids.expand(4, num_tokens, num_experts),
        meta(num_tokens, dtype=torch.int64),
        meta(3, 4, num_experts, dtype=torch.int64),
        meta(4, num_experts + 1, dtype=torch.int64),
    )


def launch_attention(batch: int, heads: int, kv_heads: int, head_dim: int = 128, blocks: int = 256) -> None:
    cache = meta(1000, 16, kv_heads, head_dim)
    attention.attend_decode(
        meta(batch, heads, head_dim),
        cache,
        cache,
        meta(batch, blocks, dtype=torch.int64),
        meta(batch, dtype=torch.int64),
    )
    rope = meta(batch, 2, head_dim)
    attention.rotate_and_store(
        meta(batch, heads, head_dim),
        meta(batch, kv_heads, head_dim),
        meta(batch, kv_heads, head_dim),
        (rope[:, 0, None], rope[:, 1, None]),
        cache,
        cache,
        meta(batch, dtype=torch.int64),
    )


def launch_all(few: bool = False) -> None:
    """Launch every kernel in all forms that a LLaMA of common shape needs. `few`: only with the fewest and the most tokens."""
    for num_tokens in (1, 512) if few else (1, 2, 4, 5, 32, 64, 512):
        launch_experts(num_tokens)
    launch_experts(512, 4096, 1792)
    for format in INTEGERS:
        for num_tokens in (1, 512) if few else (1, 2, 32, 64, 512):
            launch_experts(num_tokens, format=format)
        for num_rows in (1, 300) if few else (1, 2, 32, 64, 300):
            launch_linear(num_rows, format, num_inputs=11008)
        launch_linear(2, format, num_inputs=3584, num_outputs=512, bias=True)
    linear.linear(meta(1, 4096), meta(4096, 4096))
    if few:  # a nested layer has many kernels, which take minutes
        for num_tokens in (1, 9):
            wanted = nested_linear.Tokens(meta(num_tokens, dtype=torch.float32))
            nested_linear.product(meta(num_tokens, 4096), meta_nested(4096, 4096), wanted, True)
    else:
        for num_tokens in (1, 16, 32, 512):
            launch_nested(num_tokens)
    launch_routing(64, 8, MoeLayerConfig(8, 2, 1376, score_norm_top_k=2))
    launch_routing(64, 5, MoeLayerConfig(5, 2, 1376, score_function="sigmoid", expert_weight="one"), bias=True)
    launch_routing(64, 256, MoeLayerConfig(256, 2, 1376))
    launch_attention(1, 32, 32)
    launch_attention(64, 32, 32)
    launch_attention(1, 32, 8)
    launch_attention(64, 28, 4)
    launch_attention(2, 9, 3, head_dim=80)
    norm_activation.add_rms_norm(meta(8, 4096), meta(8, 4096), meta(4096), 1e-6)
    norm_activation.rms_norm(meta(8, 4000), meta(4000), 1e-6)
    norm_activation.silu_mul(meta(8, 11008), meta(8, 11008))


def usage(kernel: Any) -> dict[str, int]:
    """Registers per thread, and bytes per thread that did not fit into registers.

    The kernels have no arrays of their own on the stack, so all that is there was spilled.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return {"registers": int(found[1]), "spilled": int(found[2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--few", action="store_true", help="compile for the fewest and the most tokens only")

    compiled: set[str] = set()

    def report(name: str, constants: dict[str, Any], kernel: Any) -> None:
        if kernel.hash in compiled:  # launched before, with the same constants
            return
        compiled.add(kernel.hash)
        line = {"kernel": name, "shared": kernel.metadata.shared, **usage(kernel), "constants": constants}
        print(json.dumps(line), flush=True)

    args = parser.parse_args()
    with compile_only(args.capability, report):
        launch_all(args.few)


if __name__ == "__main__":
    main()
