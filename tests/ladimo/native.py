"""The compiled CPU step in the hands of tests."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ladimo.checkpoint import load_model, read_policies
from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from tests.factories import VOCAB_SIZE
from tests.ladimo.stepping import Row, Stepper, make_tables

# Further flags for the compiler. Each set leaves vectors of another width, so that every processor's code is tested on one. Two
# are not optimised, which takes a tenth of the time to compile and runs these small models as fast.
WIDTHS: dict[str, tuple[str, ...]] = {
    "as_wide_as_can_be": (),
    "no_bf16_products": ("-O0", "-mno-avx512bf16", "-mno-avx512vnni"),
    "avx2": ("-mno-avx512f", "-mno-avx512bf16", "-mno-avx512vnni"),
    "sse": ("-O0", "-mno-avx2"),
}


# Plain code in the place of matrix units, which few processors have.
EMULATED_UNITS = ("-O0", "-DEMULATE_MATRIX_UNITS")


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[MoeTransformer, list[RoutingPolicy]]:
    model = load_model(path, dtype, torch.device("cpu"))
    return model, list(read_policies(path, model.config).values())


class Cached(Stepper):
    """A stepper of a native step: its cache has the step's dtype."""

    def __init__(
        self,
        model: MoeTransformer,
        step: NativeStep,
        policies: Sequence[RoutingPolicy],
        block_size: int = 4,
        num_blocks: int = 256,
    ) -> None:
        super().__init__(model, make_tables(model, policies), block_size, num_blocks)
        self.native = step
        self.kv_cache = KVCache(self.kv_cache.k.to(step.dtype), self.kv_cache.v.to(step.dtype))

    @torch.no_grad()
    def step(self, decode: Sequence[Row] = (), prefill: Sequence[tuple[Row, int]] = ()) -> list[Tensor]:
        logits, *_ = self.native(self.inputs(decode, prefill), self.kv_cache, self.tables)
        counts = [1] * len(decode) + [count for _, count in prefill]
        for row, count in zip([*decode, *(row for row, _ in prefill)], counts, strict=True):
            row.computed += count
        return list(logits.split(counts))


def prompts(count: int, length: int = 60) -> list[list[int]]:
    """Random token ids, the same for each call."""
    generator = random.Random(1)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for _ in range(count)]
