"""Attention in the CPU step: parts of a context, and what the cache holds behind a sequence."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ladimo.model.cpu import build
from ladimo.model.cpu.native_step import NativeStep
from tests.factories import make_moe
from tests.ladimo.native import Cached, load, prompts
from tests.ladimo.stepping import Row, Stepper, make_tables

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("width")
def test_parts_of_a_long_context(tmp_path: Path, dtype: str) -> None:
    """Their attention is computed by one thread or divided among several, and in chunks of a prompt, with equal bits. It is
    torch's."""
    model, policies = load(make_moe(tmp_path, max_position_embeddings=1024), getattr(torch, dtype))
    tokens = [one for prompt in prompts(20) for one in prompt][:400]

    def decoded(steps: Stepper, chunks: tuple[int, ...], others: int = 0) -> Tensor:
        """The logits of 4 tokens from position sum(chunks) on."""
        rows = [Row(tokens[: 400 - index], blocks=[]) for index in range(1 + others)]
        for count in chunks:
            steps.step(prefill=[(row, count) for row in rows])
        return torch.cat([steps.step(decode=rows)[0] for _ in range(4)])

    one = Cached(model, NativeStep(model, dtype, 1), policies, 64, num_blocks=512)
    several = Cached(model, NativeStep(model, dtype, 3, wake_threads_from=0), policies, 64, num_blocks=512)
    for length in (255, 300):
        expected = decoded(one, (length,))
        assert torch.equal(decoded(several, (200, length - 200)), expected)
        assert torch.equal(decoded(several, (length,), others=6), expected)
    if dtype == "float32":
        reference = Stepper(model, make_tables(model, policies), 64, num_blocks=512)
        torch.testing.assert_close(expected, decoded(reference, (300,)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 16), ("bfloat16", 4), ("bfloat16", 5), ("bfloat16", 16)])
@pytest.mark.usefixtures("width")
def test_what_the_cache_holds_behind_a_sequence_does_not_count(tmp_path: Path, dtype: str, block_size: int) -> None:
    """Not even where it is no number. A sequence may end between two positions that are read together. Blocks of 16 positions
    are read where they are, others are copied."""
    model, policies = load(make_moe(tmp_path, head_dim=16), torch.bfloat16)
    numbers, none = (Cached(model, NativeStep(model, dtype, 1), policies, block_size) for _ in range(2))
    for cache in (none.kv_cache.k, none.kv_cache.v):
        cache.fill_(torch.nan)
    for tokens in prompts(3):
        several = [Row(list(tokens), blocks=[]), Row(list(tokens), blocks=[])]
        for steps, row in zip((numbers, none), several, strict=True):
            steps.step(prefill=[(row, 33)])
        for _ in range(4):
            expected, logits = (steps.step(decode=[row])[0] for steps, row in zip((numbers, none), several, strict=True))
            assert torch.equal(logits, expected) and logits.isfinite().all()
